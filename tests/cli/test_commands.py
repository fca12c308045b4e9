"""The command line as users type it: what it prints, what it writes, how it fails."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import pytest
from lfm2kit_cpu_simd.backend import CpuSimdBackend

from lfm2kit import specs
from lfm2kit.__main__ import main
from lfm2kit.building.loading import EMBEDDED
from lfm2kit.checkpoint import open_checkpoint
from lfm2kit.measuring import samples
from lfm2kit.measuring.timing import Timing
from lfm2kit.memory import HostMemory
from lfm2kit.records import values
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.state import Room
from lfm2kit.testing.checks import CHECKS
from lfm2kit.testing.checks.registry import Check
from lfm2kit.testing.random_weights import seed_of
from lfm2kit.testing.trial import Trial

TINY = EMBEDDED / "tiny"
VOCABULARY = open_checkpoint(TINY).spec.lm_head.vocab_size


class Done(NamedTuple):
    code: int
    out: str
    err: str


Cli = Callable[..., Done]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run a command in this process, exactly as the console script does."""

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["lfm2kit", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()  # always ends so: the code is 0 where all is well
        captured = capsys.readouterr()
        return Done(int(ended.value.code or 0), captured.out, captured.err)

    return run


def fails(done: Done, *words: str) -> None:
    """Exit code 2, nothing on stdout, and one line on stderr that says all the words."""
    assert done.code == 2, done
    assert done.out == ""
    lines = [line for line in done.err.splitlines() if "error:" in line]
    assert len(lines) == 1, done.err
    assert "Traceback" not in done.err
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize("plan", ["reference", "cpu_simd", "hybrid"])
def test_run_prints_the_lines_that_graders_grep(cli: Cli, plan: str) -> None:
    done = cli("run", "-v", "-n", 5, "--backend", plan)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert any(line.startswith("Elapsed time: ") and line.endswith(" (sec)") for line in lines)
    assert any(
        line.startswith("Throughput: ") and line.endswith(" (samples/sec)") for line in lines
    )
    assert "Top-1 Prediction Accuracy: 100% (5/5)" in lines
    assert "VALID" in lines


def test_auto_says_what_it_stands_for(cli: Cli) -> None:
    assert "Backend: cpu_simd (auto), fp32" in cli("run", "-n", 1).out


@pytest.mark.parametrize(
    ("plan", "precision"),
    [
        ("cpu_simd:bf16", "bf16"),
        ("cpu_simd:bf16,head=reference:fp32", "bf16 and fp32"),
    ],
)
def test_the_precision_shown_is_the_one_that_computes(cli: Cli, plan: str, precision: str) -> None:
    done = cli("run", "-n", 1, "-b", plan)
    assert f"Backend: {plan}, {precision}, ranks: 1" in done.out, done
    assert json.loads(cli("plan", "-b", plan, "--json", "-").out)["precision"] == precision


def test_a_block_is_measured_in_the_precision_that_computes_it(cli: Cli) -> None:
    plan = "cpu_simd,moe=cpu_simd:bf16"
    done = cli("bench", "-b", plan, "-n", 1, "-r", 1, "--block", "moe", "--json", "-")
    assert [row["precision"] for row in json.loads(done.out)["results"]] == ["bf16"]


def test_hybrid_without_a_gpu_says_so_in_one_line(cli: Cli) -> None:
    err = cli("run", "-n", 1, "--backend", "hybrid").err
    assert len([line for line in err.splitlines() if "GPU blocks run on cpu_simd" in line]) == 1


def test_cuda_where_there_is_none_is_an_error_and_no_fallback(cli: Cli) -> None:
    fails(cli("run", "--backend", "cuda"), "cuda", "cpu_simd")


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_outputs_are_the_same_bits_at_every_batch_size(
    cli: Cli, batch_size: int, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole.bin", tmp_path / "parts.bin"
    assert cli("run", "-n", 7, "--outputs", whole).code == 0
    assert cli("run", "-n", 7, "--batch-size", batch_size, "--outputs", parts).code == 0
    assert whole.read_bytes() == parts.read_bytes()
    assert samples.read_answers(whole).shape == (7, VOCABULARY)


@pytest.mark.parametrize("plan", ["reference", "cpu_simd", "hybrid", "cpu_simd,moe=reference"])
def test_outputs_are_the_same_bits_when_trimmed(cli: Cli, plan: str, tmp_path: Path) -> None:
    whole, trimmed = tmp_path / "whole.bin", tmp_path / "trimmed.bin"
    assert cli("run", "-n", 7, "-b", plan, "--outputs", whole).code == 0
    done = cli("run", "-n", 7, "-b", plan, "--outputs", trimmed, "--trim", "--json", "-")
    assert json.loads(done.out)["rewrites"] == ["trim"]
    assert "fp32, trim, ranks: 1" in done.err
    assert whole.read_bytes() == trimmed.read_bytes()


def test_the_number_of_threads_does_not_change_a_bit(cli: Cli, tmp_path: Path) -> None:
    one, two = tmp_path / "one.bin", tmp_path / "two.bin"
    assert cli("run", "-n", 9, "--threads", 1, "--outputs", one).code == 0
    assert cli("run", "-n", 9, "--outputs", two).code == 0
    assert one.read_bytes() == two.read_bytes()


def test_json_on_stdout_stands_alone(cli: Cli) -> None:
    done = cli("run", "-v", "-n", 3, "--json", "-", "--backend", "reference")
    fields = json.loads(done.out)
    assert fields["samples"] == 3
    assert fields["validation"]["valid"] is True
    assert "VALID" in done.err.splitlines()


def test_json_to_a_file(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    assert cli("run", "-n", 3, "--json", path, "--backend", "reference").code == 0
    assert json.loads(path.read_text())["backend"] == "reference"


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    return Path(shutil.copy(TINY / "answers.bin", tmp_path / "answers.bin"))


def spoilt(path: Path, sample: int, vocab: int, value: float) -> None:
    logits = np.array(samples.read_answers(path))
    logits[sample, vocab] = value
    samples.write_outputs(path, logits)


@pytest.mark.parametrize("value", [1e6, float("nan")])
def test_a_wrong_answer_is_invalid_with_exit_code_1(cli: Cli, answers: Path, value: float) -> None:
    spoilt(answers, 2, 7, value)
    done = cli("run", "-v", "-n", 4, "--answers", answers, "--backend", "reference")
    assert done.code == 1
    assert "INVALID" in done.out.splitlines()
    assert "First mismatch at sample[2], vocab[7]" in done.out
    assert f"Total mismatches: 1/{4 * VOCABULARY}" in done.out


def test_a_wrong_answer_beyond_n_does_not_matter(cli: Cli, answers: Path) -> None:
    spoilt(answers, 4, 7, 1e6)
    assert cli("run", "-v", "-n", 4, "--answers", answers, "--backend", "reference").code == 0


def test_short_and_misshapen_answers_are_invalid(cli: Cli, answers: Path) -> None:
    logits = np.array(samples.read_answers(answers))
    for wrong in (logits[:3], logits[:, :1000]):
        samples.write_outputs(answers, wrong)
        done = cli("run", "-v", "-n", 4, "--answers", answers, "--backend", "reference")
        assert (done.code, "INVALID" in done.out.splitlines()) == (1, True)
    answers.write_bytes(answers.read_bytes()[:-5])
    done = cli("run", "-v", "-n", 4, "--answers", answers, "--backend", "reference")
    assert (done.code, "INVALID" in done.out.splitlines()) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "tinny"], ["tinny", "tiny"]),
        (["--model", "."], ["model.safetensors"]),
        (["--backend", "cdua"], ["cdua", "cpu_simd"]),
        (["--backend", "reference,9.moe=cpu_simd"], ["9.moe", "0-5"]),
        (["--backend", "reference,0.moe=cpu_simd"], ["0.moe", "2, 3, 4"]),
        (["--backend", "reference,mo=cpu_simd"], ["mo", "moe"]),
        (["--backend", "reference", "--plan", "x.toml"], ["--plan"]),
        (["--plan", "nowhere.toml"], ["nowhere.toml"]),
        (["--precision", "fp12"], ["fp12"]),
        (["--backend", "reference", "--precision", "bf16"], ["bf16", "fp32"]),
        (["--backend", "cpu_simd,mlp=reference:bf16"], ["'reference'", "bf16", "fp32"]),
        (["--backend", "cpu_simd:"], ["cpu_simd:", "NAME:bf16"]),
        (["--threads", "4000", "--backend", "cpu_simd"], ["4000"]),
        (["-n", "129"], ["129", "128"]),
        (["--inputs", "nowhere.bin"], ["nowhere.bin"]),
        (["-v", "--answers", "nowhere.bin"], ["nowhere.bin"]),
        (["--outputs", "nowhere/outputs.bin"], ["nowhere"]),
        (["--json", "nowhere/result.json"], ["nowhere"]),
        (["--n-cpu-moe", "7"], ["4 MoE layers"]),
        (["--ranks", "2", "--transport", "carrier-pigeon"], ["carrier-pigeon", "mpi"]),
    ],
)
def test_what_the_user_must_change_is_one_line(
    cli: Cli,
    arguments: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    fails(cli("run", *arguments), *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "option", "refused", "least"),
    [
        ("run", "-n", "0", 1),
        ("run", "-n", "-3", 1),
        ("run", "-n", "x", 1),
        ("run", "--batch-size", "0", 1),
        ("run", "--random-inputs", "0", 1),
        ("run", "--ranks", "0", 1),
        ("run", "--seed", "-1", 0),
        ("run", "--threads", "0", 1),
        ("plan", "--n-cpu-moe", "-1", 0),
        ("plan", "--tokens", "1.5", 1),
        ("bench", "--repetitions", "0", 1),
        ("bench", "--seed", "-1", 0),
    ],
)
def test_a_number_out_of_range_is_refused_in_our_words(
    cli: Cli, command: str, option: str, refused: str, least: int
) -> None:
    expected = f"expected a whole number of {least} or more, such as {option} {least}"
    fails(cli(command, option, refused), f"{option} {refused}: {expected}")


def test_an_id_outside_the_vocabulary_is_named(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "inputs.bin"
    ids = np.zeros((3, 5), np.int32)
    ids[1, 4] = VOCABULARY
    samples.write_inputs(path, ids)
    fails(cli("run", "--inputs", path), "sample 1, position 4", str(VOCABULARY))


@pytest.mark.parametrize("length", [1, 33])
def test_samples_of_other_lengths_run(cli: Cli, length: int, tmp_path: Path) -> None:
    path = tmp_path / "inputs.bin"
    samples.write_inputs(path, np.full((2, length), 5, np.int32))
    assert cli("run", "--inputs", path, "--backend", "reference").code == 0


def test_experts_of_some_layers_on_the_cpu(cli: Cli) -> None:
    done = cli("plan", "--backend", "reference", "-ncmoe", 2, "--json", "-")
    rows = {row["block"]: row["backend"] for row in json.loads(done.out)["blocks"]}
    assert rows["layers.2.feed_forward.experts"] == "cpu_simd"
    assert rows["layers.3.feed_forward.experts"] == "cpu_simd"
    assert rows["layers.4.feed_forward.experts"] == "reference"


def test_plan_shows_every_block_once_and_adds_up(cli: Cli) -> None:
    fields = json.loads(cli("plan", "--backend", "cpu_simd,2-4.moe=reference", "--json", "-").out)
    blocks = {row["block"]: row for row in fields["blocks"]}
    assert blocks["layers.2.feed_forward.router"]["backend"] == "reference"
    assert blocks["layers.5.feed_forward"]["spec"] == "SparseMoe"
    total = sum(row["weight_bytes"] for row in fields["blocks"])
    assert fields["totals"]["host"]["weight_bytes"] == total
    assert "layers.5.operator" in cli("plan").out


def test_plan_says_for_how_many_blocks_it_knows_no_bytes(
    cli: Cli, random_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lfm2kit.building.capacity.MemoryFigures", CpuSimdBackend)
    asked = ("plan", "-m", random_folder, "--backend", "cpu_simd,2.moe=reference")
    done = cli(*asked, "--sequences", 2, "--context", 4096).out
    (line,) = (line for line in done.splitlines() if "of weights as stored" in line)
    assert re.search(r"at least .* kept, at least .* of scratch with 2048 tokens at once", line)
    assert " (unknown for 2 of 37 blocks), " in line
    assert "of state in 64 pages" in line
    total = json.loads(cli(*asked, "--json", "-").out)["totals"]["host"]
    assert total["unknown_blocks"] == 2
    nothing = cli("plan", "--backend", "reference").out
    assert re.search(r"kept and scratch bytes unknown for all \d+ blocks", nothing)
    assert "0 B kept" not in nothing
    assert "unknown" not in cli("plan", "-m", random_folder, "--backend", "cpu_simd").out


def test_a_precision_in_the_plan_is_judged_by_its_grade(cli: Cli) -> None:
    for plan, judged_by in (("cpu_simd", "logits"), ("cpu_simd:bf16,head=cpu_simd", "top-1")):
        fields = json.loads(cli("run", "-v", "-n", 5, "-b", plan, "--json", "-").out)
        assert fields["validation"]["judged_by"] == judged_by
        assert fields["backend"] == plan


def test_a_tolerance_is_named_in_the_verdict(cli: Cli) -> None:
    run = ("run", "-n", 5, "-b", "cpu_simd:bf16")
    loose = cli(*run, "-v", "--tolerance", 1)
    assert loose.code == 0
    instead = "VALID (1 allowed instead of top-1 alone of the grade BF16 weights)"
    assert instead in loose.out.splitlines()
    strict = cli(*run, "-v", "--tolerance", "1e-9")
    assert (strict.code, "INVALID (1e-09 allowed" in strict.out) == (1, True)
    useless = cli(*run, "--tolerance", 1)
    assert (useless.code, "--tolerance 1 needs -v" in useless.err) == (2, True)
    for wrong in ("0", "-1", "nan", "inf"):
        refused = cli(*run, "-v", "--tolerance", wrong)
        assert (refused.code, "expected a number above 0" in refused.err) == (2, True)


def test_plan_shows_what_becomes_of_stored_weights(cli: Cli) -> None:
    """Tiny is stored in BF16, all of it."""

    def formats(*options: object) -> dict[str, list[str]]:
        fields = json.loads(cli("plan", *options, "--json", "-").out)
        return {row["block"]: row["formats"] for row in fields["blocks"]}

    plan = formats("-b", "cpu_simd,mlp=reference")
    assert plan["layers.0.operator_norm"] == ["BF16 widened to F32"]
    assert plan["layers.0.operator"] == plan["layers.0.feed_forward"] == ["BF16 as stored"]
    rounded = formats("-b", "cpu_simd", "--precision", "fp16")
    assert rounded["layers.2.feed_forward"] == ["BF16 as stored", "BF16 rounded to F16"]
    assert rounded["embed_tokens"] == ["BF16 as stored"]
    assert "BF16 widened to F32" in cli("plan", "-b", "cpu_simd").out


def test_plan_shows_how_many_rows_trimmed_layers_keep(cli: Cli, random_folder: Path) -> None:
    plan = ("plan", "-m", random_folder)
    fields = json.loads(cli(*plan, "--trim", "--json", "-").out)
    assert fields["block_notes"] == {
        f"layers.{i}": f"{kept} of a sample's rows go on after its operator"
        for i, kept in [(5, 5), (6, 3), (7, 1)]
    }
    assert "layers.7.last_rows" in {row["block"] for row in fields["blocks"]}
    assert "layers.7: 1 of a sample's rows" in cli(*plan, "--trim").out
    assert json.loads(cli(*plan, "--json", "-").out)["block_notes"] == {}


def test_plan_shows_a_ranks_share_without_a_job(
    cli: Cli, random_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ReferenceBackend, "memory", lambda self, spec: other_memory("device"))
    arguments = ("plan", "-m", random_folder, "-b", "reference", "--json", "-")
    alone, share = (
        json.loads(cli(*arguments, *more).out)
        for more in ([], ["--ranks", 4, "--rank", 3, "--parallel", "ep"])
    )
    assert (share["rank"], share["ranks"], share["rewrites"]) == (3, 4, ["experts-over-ranks"])
    note = "this rank holds experts 12-15 of 16; device <-> host"
    assert share["block_notes"] == {f"layers.{i}.feed_forward": note for i in range(2, 8)}
    whole, mine = (
        {row["block"]: row["weight_bytes"] for row in fields["blocks"]} for fields in (alone, share)
    )
    experts = "layers.2.feed_forward.experts"
    assert whole[experts] == 4 * mine[experts]
    assert whole["layers.2.feed_forward.router"] == mine["layers.2.feed_forward.router"]
    assert alone["copied"] == {"around": 0, "batch": 5, "logits": 1}
    assert share["copied"]["around"] == 6 * (2 + 3 + 4)  # each MoE, its router, its experts
    assert values(share, "copied arrays") == [6 * (2 + 3 + 4) + 6]
    reasons = Counter(share["waits"].values())
    none_calls = "no backend of the plan calls blocks of another memory"
    assert reasons == {"it consists of several blocks": 6, none_calls: 12}
    shown = cli("plan", "-m", random_folder, "-b", "reference", "--ranks", 4, "--tokens", 9).out
    assert f"layers.7.feed_forward.experts (12 blocks): waits for its copies: {none_calls}" in shown
    assert "forward: 60 (54 around 18 blocks, 5 of the batch, 1 of the logits)" in shown
    assert "reference, rank 0 of 4" in shown
    assert "layers.2.feed_forward to layers.7.feed_forward (6 blocks): this rank holds" in shown
    fails(cli("plan", "--ranks", 4, "--rank", 4), "--rank 4: ranks are 0 to 3; give --ranks 5")


def test_a_rewrite_that_is_not_there_is_named(cli: Cli) -> None:
    for command in ("run", "plan", "bench"):
        fails(cli(command, "--rewrite", "trin"), "unknown rewrite 'trin'", "'trim'")
    fails(cli("plan", "--trim", "--rewrite", "trim"), "rewrite 'trim' is given twice")
    fails(cli("plan", "--rewrite", ""), "`lfm2kit plugins` lists them")


@pytest.fixture
def half_a_gigabyte_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostMemory, "free_bytes", lambda self, ranks=1: 500_000_000)
    monkeypatch.setattr(ReferenceBackend, "kept_bytes", lambda self, spec, weights: 100_000_000)


@pytest.mark.usefixtures("half_a_gigabyte_free")
@pytest.mark.parametrize("command", ["run", "bench", "warmup"])
def test_too_little_memory_is_an_error_before_loading(cli: Cli, command: str) -> None:
    done = cli(command, "-b", "reference")
    assert done.code == 2
    (line,) = (line for line in done.err.splitlines() if "error:" in line)
    assert "memory 'host' is too small" in line
    assert "2.7 GB are missing" in line
    assert "Elapsed" not in done.out


@pytest.mark.usefixtures("half_a_gigabyte_free")
def test_samples_that_memory_cannot_hold_are_refused_before_they_are_made(cli: Cli) -> None:
    asked = ("--random-inputs", 500, "-n", 100_000)
    fails(cli("run", "-b", "reference", *asked), "100000 samples of 500 tokens", "1.0 GB", "500 MB")


def test_memory_that_runs_out_anywhere_is_for_the_user_to_change(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails_to_open(path: Path, *others: object, **options: object) -> None:
        raise MemoryError("Unable to allocate 5 TiB")

    monkeypatch.setattr("lfm2kit.cli.options.open_checkpoint", fails_to_open)
    fails(cli("plan"), "not enough memory (Unable to allocate 5 TiB)")


@pytest.mark.usefixtures("half_a_gigabyte_free")
def test_plan_shows_what_is_free_and_missing(cli: Cli) -> None:
    fields = json.loads(cli("plan", "-b", "reference", "--json", "-").out)
    assert fields["free_bytes"] == {"host": 500_000_000}
    assert fields["host_limits"]["memory of this machine"]["limit"] > 0
    assert "2.7 GB are missing" in fields["shortage"]
    out = cli("plan", "-b", "reference").out
    assert "with 2048 tokens at once; 500 MB are free" in out
    assert fields["shortage"] in out
    assert "500 MB are free for each of 4 ranks" in cli("plan", "-b", "reference", "--ranks", 4).out


def test_plan_says_that_sequences_without_a_context_show_no_state(cli: Cli) -> None:
    plan = ("plan", "-b", "reference", "--sequences", 16)
    out = cli(*plan).out
    assert "--sequences 16 needs --context TOKENS to show a state" in out
    with_context = cli(*plan, "--context", 200).out
    assert "in 32 pages of 128 tokens" in with_context
    assert "to show a state" not in with_context


def test_a_plan_file_says_the_same_as_text(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text('default = "cpu_simd"\n[[rule]]\nkind = "attn"\nbackend = "reference"\n')
    from_file = json.loads(cli("plan", "--plan", path, "--json", "-").out)
    from_text = json.loads(cli("plan", "--backend", "cpu_simd,attn=reference", "--json", "-").out)
    for moving in ("free_bytes", "host_limits"):  # what this machine has left just now
        assert from_file.pop(moving).keys() == from_text.pop(moving).keys()
    assert from_file.pop("options") == {"--plan": str(path)}
    assert from_text.pop("options") == {"--backend": "cpu_simd,attn=reference"}
    assert from_file.pop("date") <= from_text.pop("date")
    assert from_file == from_text


def test_backends_lists_what_can_run_here(cli: Cli) -> None:
    fields = json.loads(cli("backends", "--json", "-").out)
    assert {"reference", "cpu_simd", "hybrid"} <= {row["name"] for row in fields["backends"]}
    assert "cpu_simd" in cli("backends", "list").out


def test_plugins_says_of_each_where_it_is_what_it_adds_and_why_it_is_not_used(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LFM2KIT_PLUGINS", "reference,cuda")
    monkeypatch.setattr("lfm2kit_cuda.requirements.why_unavailable", lambda: "no driver")
    fails(cli("run", "-b", "blas"), "unknown backend 'blas'", "LFM2KIT_PLUGINS is reference,cuda")
    said = cli("plugins").out
    place = rf"lfm2kit {version('lfm2kit')}, (editable|installed) in /.*"
    adds = r"  hooks: lfm2kit_backends\n  backend reference \(API 1\): plain NumPy in float64.*\n"
    assert re.search(rf"^reference: {place}\n{adds}", said, re.MULTILINE)
    assert "on an NVIDIA GPU (cannot run here: no driver)\n" in said
    assert re.search(
        r"^blas: .*\n  not used: LFM2KIT_PLUGINS does not name it\n", said, re.MULTILINE
    )


def test_backends_check_judges_and_names_what_there_is(cli: Cli) -> None:
    done = cli("backends", "check", "reference", "--only", "mlp,router-scaling")
    assert done.code == 0, done
    assert "2 passed, 0 failed, 0 skipped" in done.out
    fails(cli("backends", "check", "refrence"), "refrence", "reference")
    fails(cli("backends", "check", "reference", "--only", "mpl"), "mpl", "mlp")


def test_backends_check_lists_and_explains_its_checks(cli: Cli) -> None:
    done = cli("backends", "check", "--list")
    assert done.code == 0
    rows = json.loads(cli("backends", "check", "--list", "--json", "-").out)["checks"]
    assert [row["id"] for row in rows] == list(CHECKS)
    assert all(row["id"] in done.out and row["summary"] in done.out for row in rows)
    done = cli("backends", "check", "--explain", "zero-rows")
    assert CHECKS["zero-rows"].documentation in done.out
    assert "lfm2kit backends check NAME --only zero-rows" in done.out
    paragraphs = CHECKS["mlp-w1-is-the-gate"].documentation.split("\n\n")
    assert len(paragraphs) > 1
    done = cli("backends", "check", "--explain", "mlp-w1-is-the-gate")
    assert done.out.split("\n\n")[1] == paragraphs[1]
    fails(cli("backends", "check", "--explain", "zero-row"), "zero-row", "zero-rows")
    fails(cli("backends", "check", "--list", "--explain", "mlp"), "--list and --explain")
    fails(cli("backends", "check"), "no backend is named", "reference")
    fails(cli("backends", "check", "refrence", "--list"), "refrence", "reference")


def test_another_seed_draws_other_inputs(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def look(trial: Trial) -> None:
        drawn.append(int(trial.rng.integers(2**31)))

    monkeypatch.setitem(CHECKS, "mlp", Check("mlp", look))
    for seed in ("0", "1", "1"):
        assert cli("backends", "check", "reference", "--only", "mlp", "--seed", seed).code == 0
    assert drawn[0] != drawn[1] == drawn[2]
    again = cli("backends", "check", "reference", "--only", "mlp", "--seed", "1", "--json", "-")
    assert json.loads(again.out)["seed"] == 1
    assert drawn[0] == np.random.default_rng(seed_of("mlp")).integers(2**31), "0 is the default's"
    fails(cli("backends", "check", "reference", "--seed", "-1"), "--seed", "-1")


def test_env_names_versions_and_backends(cli: Cli) -> None:
    fields = json.loads(cli("env", "--json", "-").out)
    assert fields["backends"]["reference"] == "ready"
    assert "numpy" in fields["packages"]
    assert " free of " in fields["memory"]["memory of this machine"]


@pytest.mark.parametrize("form", ["md", "csv"])
def test_bench_prints_a_row_per_backend_and_size(cli: Cli, form: str) -> None:
    done = cli(
        "bench",
        "-n",
        "1,3",
        "-r",
        2,
        "-b",
        "reference",
        "-b",
        "cpu_simd,attn=reference",
        "-o",
        form,
    )
    rows = done.out.strip().splitlines()
    assert done.code == 0, done.err
    assert len(rows) == 4 + (2 if form == "md" else 1)


@pytest.mark.parametrize("block", ["conv", "attn", "moe"])
def test_bench_measures_single_blocks_against_the_roofline(cli: Cli, block: str) -> None:
    done = cli("bench", "--block", block, "-n", "2", "-r", 3, "-b", "cpu_simd", "--json", "-")
    record = json.loads(done.out)
    (row,) = record["results"]
    assert row["test"] == row["figure"] == f"{block} 2x16"
    assert median(values(record, row["figure"])) == row["median_seconds"]
    assert len(values(record, row["figure"])) == 3
    assert row["roofline"] >= row["memory_share"] > 0
    read = row["memory_share"] * row["ceilings"]["bytes"]
    assert row["gbytes_per_second"] * 1e9 == pytest.approx(read)
    assert row["ceilings"]["measured_by"] == "cpu_simd"
    assert "ceilings, measured in this run by cpu_simd: " in done.err


def test_bench_decodes_one_token_after_another(cli: Cli) -> None:
    lists = ("-n", "1,3", "--seq-len", "2,5")
    done = cli("bench", "--decode", *lists, "-r", 2, "-b", "reference", "--json", "-")
    rows = json.loads(done.out)["results"]
    tests = ["decode 1 @ 2", "decode 1 @ 5", "decode 3 @ 2", "decode 3 @ 5"]
    assert [row["test"] for row in rows] == tests
    three, longer = rows[2:]
    assert three["tokens_per_second"] == pytest.approx(3 / three["median_seconds"])
    read = [row["gbytes_per_second"] * row["median_seconds"] * 1e9 for row in (three, longer)]
    spec = open_checkpoint(TINY).spec
    attentions = [one for one in specs.leaves(spec) if isinstance(one, specs.Attention)]
    room = Room(pages=1)
    of_a_page = sum(ReferenceBackend().state_bytes(one, room) for one in attentions)
    assert read[1] - read[0] == pytest.approx(3 * (5 - 2) * of_a_page / room.page_tokens)


def test_bench_decodes_with_guesses_and_without(cli: Cli) -> None:
    lists = ("-n", 2, "--seq-len", "16,17", "--speculate", "none,ngram,none")
    done = cli("bench", "--decode", *lists, "-r", 1, "-b", "reference", "--json", "-")
    rows = json.loads(done.out)["results"]
    assert [row["test"] for row in rows] == [
        "decode 2 @ 16", "decode 2 @ 16 ngram", "decode 2 @ 17", "decode 2 @ 17 ngram",
    ]  # fmt: skip
    assert [row["speculate"] for row in rows] == ["none", "ngram"] * 2
    assert [row["tokens"] for row in rows] == [2, 16] * 2
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["median_seconds"])
        assert (row["memory_share"], row["ceilings"]) == (None, None)  # the reference measures none
    assert "every guess is right, which makes 8 tokens of a sequence a step" in done.err


def test_bench_measures_samples_of_several_lengths(cli: Cli) -> None:
    done = cli("bench", "-n", "2", "--seq-len", "3,1", "-r", 1, "-b", "reference", "--json", "-")
    assert [row["test"] for row in json.loads(done.out)["results"]] == ["model 2x3", "model 2x1"]


def test_bench_measures_a_trimmed_model_by_the_work_that_is_left(
    cli: Cli, random_folder: Path
) -> None:
    arguments = ("bench", "-m", random_folder, "-n", "2", "-r", 2, "-b", "cpu_simd", "--json", "-")
    (whole,) = json.loads(cli(*arguments).out)["results"]
    (trimmed,) = json.loads(cli(*arguments, "--trim").out)["results"]
    assert (whole["test"], trimmed["test"]) == ("model 2x16", "model+trim 2x16")
    flops = [row["gflops"] * row["median_seconds"] for row in (whole, trimmed)]
    assert 0.7 < flops[1] / flops[0] < 0.9  # 2.2 of 8 layers are left out


def test_warmup_names_the_plan_that_is_ready(cli: Cli) -> None:
    done = cli("warmup", "-b", "cpu_simd,attn=reference", "--json", "-")
    fields = json.loads(done.out)
    assert (done.code, fields["backend"]) == (0, "cpu_simd,attn=reference")
    fails(cli("warmup", "-b", "nonsense"), "nonsense")


@pytest.mark.parametrize(
    ("waited", "memory", "warned"),
    [(0.5, "host", True), (0.2, "host", False), (None, "host", False), (0.5, "device", False)],
)
def test_bench_warns_once_where_threads_of_cpu_blocks_waited_for_a_core(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, waited: float | None, memory: str, warned: bool
) -> None:
    monkeypatch.setattr("lfm2kit.measuring.bench.timed", lambda call: Timing(1, waited))
    monkeypatch.setattr(ReferenceBackend, "memory", lambda self, spec: other_memory(memory))
    done = cli("bench", "-n", "1,3", "-b", "reference", "--json", "-")
    assert [row["waiting"] for row in json.loads(done.out)["results"]] == [waited, waited]
    warnings = [line for line in done.err.splitlines() if "warning:" in line]
    assert len(warnings) == warned
    if warned:
        assert "for 50% of a call's time" in warnings[0]
        assert "in 2 of 2 rows" in warnings[0]
        assert "--threads" in warnings[0]


def other_memory(name: str) -> HostMemory:
    memory = HostMemory()
    memory.name = name
    return memory


def test_no_state_is_planned_for_a_rewrite_that_has_none(cli: Cli) -> None:
    fails(cli("plan", "--context", 4096, "--trim"), "--context 4096 needs a state; --trim works on")
    assert cli("plan", "--trim").code == 0


def test_bench_refuses_nonsense(cli: Cli) -> None:
    fails(cli("bench", "-n", "1,x"), "1,x")
    fails(cli("bench", "-n", "0"), "-n 0: expected whole numbers of 1 or more, such as 1,16,64")
    fails(cli("bench", "--decode", "--block", "moe"), "leave out --block")
    fails(cli("bench", "--decode", "--seq-len", "128000"), "the model's context has 128000")
    fails(cli("bench", "--decode", "-n", "100000", "--seq-len", "100000"), "100000 sequences of")
    fails(cli("bench", "--decode", "--trim"), "whole samples")
    fails(cli("bench", "--speculate", "ngram"), "--speculate ngram needs --decode")
    fails(cli("bench", "--decode", "--speculate", "none,x"), "expected a list of none, ngram")
    fails(cli("bench", "--decode", "--speculate", "ngram", "--seq-len", "15"), "--seq-len 16 or")
    fails(cli("bench", "--block", "moe", "--trim"), "the model as it is; leave out --trim")


def test_convert_goes_both_ways_to_the_same_bits(cli: Cli, tmp_path: Path) -> None:
    there, back = tmp_path / "model.bin", tmp_path / "folder"
    assert cli("convert", "tiny", there).code == 0
    assert cli("convert", there, back, "--dtype", "BF16").code == 0
    assert (back / "model.safetensors").read_bytes() == (TINY / "model.safetensors").read_bytes()
    inputs = ["--inputs", TINY / "inputs.bin", "--answers", TINY / "answers.bin"]
    for model in (there, back):
        assert cli("run", "-v", "-n", 4, "-m", model, "--backend", "reference", *inputs).code == 0


def test_convert_replaces_nothing_unasked(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"precious")
    fails(cli("convert", "tiny", path), "exists", "--overwrite")
    assert path.read_bytes() == b"precious"
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")
    fails(cli("convert", "tiny", folder, "--overwrite"), "thesis.txt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "model.bin"]


def test_convert_writes_random_checkpoints_that_run(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "random"
    assert cli("convert", "--random", TINY / "config.json", folder, "--seed", 5).code == 0
    inputs = tmp_path / "inputs.bin"
    samples.write_inputs(inputs, np.arange(6, dtype=np.int32).reshape(2, 3))
    assert cli("run", "-m", folder, "--inputs", inputs, "--backend", "reference").code == 0


def test_help_and_version(cli: Cli) -> None:
    help_text = cli("--help").out
    for command in ("run", "plan", "bench", "backends", "convert", "env"):
        assert command in help_text
    assert cli("--version").out.startswith("lfm2kit 0.")


def test_ctrl_c_leaves_no_file_behind(tmp_path: Path) -> None:
    command = ["run", "--backend", "reference", "--batch-size", "1"]
    job = subprocess.Popen(
        [sys.executable, "-m", "lfm2kit", *command, "--outputs", str(tmp_path / "outputs.bin")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    assert job.stdout is not None
    job.stdout.readline()  # it has begun
    job.send_signal(signal.SIGINT)
    _, err = job.communicate(timeout=60)
    assert job.returncode == 130
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
