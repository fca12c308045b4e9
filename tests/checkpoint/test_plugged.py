"""A checkpoint in a plugin's format goes through every command: lfm2kit-int8, with our backends."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from lfm2kit_int8.__main__ import quantise
from lfm2kit_int8.reader import WEIGHTS

from lfm2kit.building.loading import find_model
from lfm2kit.building.plugins import installed_plugins
from lfm2kit.checkpoint import open_checkpoint
from lfm2kit.measuring.samples import read_answers
from tests.checkpoint.typed import Cli


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8") / "model"
    quantise(find_model("tiny"), folder)
    return folder


@pytest.mark.parametrize("plan", ["reference", "cpu_simd", "cpu_simd,mlp=blas"])
def test_a_model_in_int8_gives_the_bits_of_its_values_in_float32(
    int8: Path, cli: Cli, tmp_path: Path, plan: str
) -> None:
    plain = tmp_path / "plain"
    assert cli("convert", int8, plain, "--dtype", "F32").code == 0
    run = ("run", "-b", plan, "--random-inputs", 7, "-n", 3)
    for model in (int8, plain):
        done = cli(*run, "-m", model, "--outputs", tmp_path / f"{model.name}.out")
        assert done.code == 0, done.err
    got, want = (read_answers(tmp_path / f"{name}.out") for name in (int8.name, plain.name))
    np.testing.assert_array_equal(got, want)
    assert np.ptp(got) > 1


def test_a_converted_model_is_a_plain_one(int8: Path, cli: Cli, tmp_path: Path) -> None:
    """Of the values rounded to int8, and no longer of a quantised format."""
    for target in (tmp_path / "bf16", tmp_path / "model.bin"):
        options = ("--dtype", "BF16") if target.suffix == "" else ()
        assert cli("convert", int8, target, *options).code == 0
        checkpoint = open_checkpoint(target)
        assert {t.format.name for t in checkpoint.weights.values()} <= {"BF16", "F32"}
        config = json.loads((checkpoint.folder / "config.json").read_text())
        assert "quantization_config" not in config


def test_a_format_that_cannot_be_written_is_named_with_what_to_type(
    int8: Path, cli: Cli, tmp_path: Path
) -> None:
    refused = "stored as I8, which lfm2kit does not write; give --dtype F32 or "
    cli("convert", int8, tmp_path / "new").assert_fails(refused)
    assert not (tmp_path / "new").exists()


def test_plan_says_what_becomes_of_each_block(int8: Path, cli: Cli) -> None:
    plan = ("plan", "-m", int8, "-b", "cpu_simd,2-3.moe=reference", "--json", "-")
    rows = {row["block"]: row for row in json.loads(cli(*plan).out)["blocks"]}
    assert rows["embed_tokens"]["formats"] == ["I8 as stored"]
    assert rows["layers.0.feed_forward"]["formats"] == ["I8 widened to F32"]
    assert rows["layers.2.feed_forward.experts"]["formats"] == ["I8 as stored"]
    assert rows["layers.4.feed_forward"]["formats"] == ["BF16 as stored", "I8 widened to F32"]
    kept, stored = (rows["layers.0.feed_forward"][key] for key in ("kept_bytes", "weight_bytes"))
    assert 3.8 < kept / stored < 4


@pytest.mark.parametrize("is_rounded", [False, True])
def test_int8_experts_decode_beside_cpu_simd_without_copies(
    int8: Path, cli: Cli, is_rounded: bool
) -> None:
    model = ("-m", int8 if is_rounded else "tiny", "-b", "cpu_simd,experts=int8:q8")
    planned = json.loads(cli("plan", *model, "--json", "-").out)
    assert planned["copied"] == {"around": 0, "batch": 0, "logits": 0}
    said = cli("generate", "It is a truth", *model, "--max-tokens", 6, "--temperature", 0)
    assert said.code == 0, said.err
    assert len(said.out.split()) > 1


def test_files_of_a_plugins_reader_are_protected(int8: Path, cli: Cli) -> None:
    run = ("run", "-m", int8, "--random-inputs", 3, "-n", 1)
    cli(*run, "--outputs", int8 / WEIGHTS).assert_fails(WEIGHTS)
    cli(*run, "--json", int8 / WEIGHTS).assert_fails(WEIGHTS)
    readers = installed_plugins().readers.values()
    assert (int8 / WEIGHTS).resolve() in open_checkpoint(int8, readers).weight_files()


def test_without_its_plugin_the_folder_is_a_quantised_one(
    int8: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LFM2KIT_PLUGINS", "reference")
    cli("run", "-m", int8).assert_fails("the weights are quantised ('int8-by-rows')")


def test_readers_are_listed(cli: Cli) -> None:
    rows = json.loads(cli("plugins", "--json", "-").out)["plugins"]
    added = [one["name"] for row in rows for one in row["adds"] if one["kind"] == "reader"]
    assert added == ["gguf", "int8"]
    assert "reader int8: matrices in int8, with a scale for each row" in cli("plugins").out
