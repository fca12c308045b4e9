"""`lfm2kit grade`: points, verdicts, what is switched, and the reports, at small widths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm2kit.backend import Ceilings
from lfm2kit.batch import Batch
from lfm2kit.building.loading import EMBEDDED, set_up
from lfm2kit.building.options import Options
from lfm2kit.checkpoint import open_checkpoint
from lfm2kit.checkpoint.synth import LFM2_8B
from lfm2kit.cli.grading import graded_ranks
from lfm2kit.cli.scaling import alone
from lfm2kit.grading import blocks, models
from lfm2kit.grading.apart import ApartLayer, apart
from lfm2kit.grading.blocks import (
    TESTS,
    VALUES,
    BlockTest,
    Drawn,
    block_setup,
    error_of,
    reference_setup,
)
from lfm2kit.grading.kinds import KindGrade, reasons
from lfm2kit.measuring.bench import Limit
from lfm2kit.specs import Work
from tests.checkpoint.typed import Cli
from tests.random_model import RANDOM
from tests.records.validating import faults

SMALL = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
    "moe_intermediate_size": 32, "num_experts": 8, "vocab_size": 128,
}  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let blocks be small, and models have few samples."""
    monkeypatch.setattr(blocks, "TWO_LAYERS", {**blocks.TWO_LAYERS, **SMALL})
    monkeypatch.setattr(blocks, "POOL", 1 << 16)
    for module in ("lfm2kit.grading.models", "lfm2kit.grading.grading"):
        monkeypatch.setattr(f"{module}.COUNTS", (2, 4))


def test_the_block_tests_are_the_assignments() -> None:
    assert {t.kind: (t.samples, t.threshold) for t in TESTS} == {
        "conv": (64, 10_000), "attn": (128, 5_000), "moe": (1, 250),
    }  # fmt: skip
    assert {n: LFM2_8B[n] for n in ("hidden_size", "num_experts")} == {
        n: blocks.TWO_LAYERS[n] for n in ("hidden_size", "num_experts")
    }


@pytest.mark.parametrize(("speed", "points"), [(0, 0), (2500, 5), (5000, 10), (9000, 10)])
def test_points_grow_linearly_up_to_the_threshold(speed: float, points: float) -> None:
    assert BlockTest("attn", 128, 5_000).points(speed) == points


def test_weights_of_different_names_differ_and_stay() -> None:
    drawn = Drawn({"a": (3, 5), "b": (3, 5)}, VALUES[0].weights)
    a, b = (drawn[name].float32() for name in "ab")
    assert not np.array_equal(a, b)
    np.testing.assert_array_equal(drawn["a"].float32(), a)
    assert (a.min() >= 0, a.max() < 1) == (True, True)


@pytest.mark.parametrize("values", VALUES, ids=lambda values: values.name)
@pytest.mark.parametrize("test", TESTS, ids=lambda test: test.kind)
def test_a_block_is_as_the_references(test: BlockTest, values: Any, small: None) -> None:
    options = Options(backend="cpu_simd")
    setups = block_setup(options, values), reference_setup(options, values)
    assert error_of(*setups, test, values) < 2e-5


def test_layers_in_parts_have_the_logits_of_whole_ones() -> None:
    batch = Batch.of_sequences([[1, 2, 3], [4, 5]])
    options = Options(backend="reference")
    want = set_up(RANDOM, options).build().logits(batch)
    parted = set_up(RANDOM, options, rewrites=[apart()])
    assert all(isinstance(layer, ApartLayer) for layer in parted.placed.spec.layers)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(parted.build().logits(batch), want)


def test_the_longer_of_computing_and_reading_limits() -> None:
    ceilings = Ceilings(flops=100.0, bytes=10.0)
    assert Limit.of(Work(300, 10), ceilings) == Limit("computing", 3.0)
    assert Limit.of(Work(300, 50), ceilings) == Limit("reading memory", 5.0)


def graded(cli: Cli, tmp_path: Path, *more: object) -> Any:
    given = ("--markdown", tmp_path / "report.md", "--html", tmp_path / "report.html", *more)
    return cli("grade", "-r", 1, *given, "--json", tmp_path / "record.json")


def test_a_plan_is_graded_and_reported(cli: Cli, tmp_path: Path, small: None) -> None:
    done = graded(cli, tmp_path, "-b", "cpu_simd")
    assert done.code == 0, done.err
    assert "VALID (top-1 " in done.out
    record = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
    assert faults(record) == []
    assert [block["kind"] for block in record["blocks"]] == ["conv", "attn", "moe"] * 2
    assert [one["samples"] for one in record["speeds"]] == [2, 4]
    assert {one["name"] for one in record["bought"]} >= {"rewrite trim", "kernels for moe"}
    assert (record["verdict"], record["fp16_verdict"]) == ("VALID", "VALID")
    assert {one["kind"] for one in record["fp16_kinds"]} >= {"conv", "attn", "mlp", "moe", "head"}
    assert "not measured: several ranks beside one: give --ranks 2" in done.out
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| conv | as the assignment's |" in report
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for title in ("Blocks", "The whole model", "FP16 by kind of block", "What optimisations buy"):
        assert f"## {title}" in report
        assert f"<h2>{title}</h2>" in page


def kind(name: str, seconds: float, half: float) -> KindGrade:
    return KindGrade(name, "some", seconds, half, "computing", 0.75)


def test_the_kinds_that_keep_fp16_below_twice_are_told_and_no_others() -> None:
    kinds = [kind("moe", 9.0, 6.0), kind("conv", 7.0, 3.5), kind("mlp", 0.5, 0.5)]
    assert list(reasons(kinds)) == [
        "moe takes 60% of FP16's time and is 1.50 times as fast as in FP32 "
        "(computing limits it, and it reaches 75% of that limit)"
    ]


@pytest.mark.mpi
def test_ranks_are_measured_beside_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lfm2kit.cli.grading.COUNTS", (2, 4))
    (tmp_path / "plan.toml").write_text('default = "reference"\n')
    options = Options(plan=tmp_path / "plan.toml")
    setup = set_up(open_checkpoint(EMBEDDED / "tiny"), options)
    several, bought = graded_ranks(setup, options, 2, "mpi", repetitions=1)
    assert (several.ranks, several.speed.samples, several.is_valid) == (2, 4, True)
    assert (bought.name, bought.how) == ("2 ranks", "one rank")


def test_what_jobs_refuse_is_said_before_anything_is_measured(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lfm2kit.cli.grading.grade", None)
    cli("grade", "--ranks", 2, "--transport", "pigeon").assert_fails("unknown transport 'pigeon'")


def test_one_process_places_no_experts_by_a_load() -> None:
    assert alone(Options(load=Path("load.json"), replicate_experts=2)) == Options()
    limited = Options(load=Path("load.json"), gpu_memory="1GiB")
    assert alone(limited) == limited


def test_options_of_jobs_need_ranks(cli: Cli) -> None:
    cli("grade", "--parallel", "ep").assert_fails("--parallel needs --ranks, such as --ranks 2")


def test_what_cannot_be_measured_is_said(
    cli: Cli, tmp_path: Path, random_folder: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "KINDS", ())
    done = graded(cli, tmp_path, "-b", "reference", "-m", random_folder)
    assert done.code == 0, done.err
    assert "not measured: FP16: a backend of 'reference' does not have it" in done.out
    assert "not validated: there is no inputs.bin and answers.bin beside the model" in done.out


def test_a_wrong_block_has_no_points_and_ends_with_code_1(
    cli: Cli, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "KINDS", ())
    monkeypatch.setattr("lfm2kit.grading.grading.error_of", lambda *asked: 0.5)
    done = graded(cli, tmp_path, "-b", "reference")
    assert done.code == 1
    assert done.out.count("INVALID") >= 6
    assert "0.0 of 10" in done.out


def test_another_precision_is_refused(cli: Cli) -> None:
    cli("grade", "--precision", "bf16").assert_fails("--precision bf16: all points but FP16's")
