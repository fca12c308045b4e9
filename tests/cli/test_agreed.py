"""What `lfm2kit run` compares between ranks: every option that changes the run, by its name."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from lfm2kit.building.load import Load, unused
from lfm2kit.building.loading import find_model
from lfm2kit.checkpoint import open_checkpoint
from lfm2kit.cli import app
from lfm2kit.cli.ranks import agreed
from lfm2kit.errors import Lfm2kitError
from lfm2kit.memory import HOST
from lfm2kit.ranks.agreement import Fact, Facts, compared
from lfm2kit.transport import World
from tests.checkpoint.typed import Cli

FactsOf = Callable[..., Facts]
RANDOM = ("--random-inputs", "4")


@pytest.fixture
def facts_of(monkeypatch: pytest.MonkeyPatch) -> FactsOf:
    """Return the facts that a rank with these arguments would report."""
    reported: list[Facts] = []

    def agreed(job: Any, prepare: Callable[[], Any], facts: Callable[[Any], Facts]) -> None:
        reported.append(facts(prepare()))
        raise typer.Exit(0)

    monkeypatch.setattr(importlib.import_module("lfm2kit.cli.run"), "agreed", agreed)

    def facts_of(*arguments: str) -> Facts:
        words = ["run", "-n", "4", "--backend", "reference", *arguments]
        app(words, prog_name="lfm2kit", standalone_mode=False)
        return reported.pop()

    return facts_of


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-n", "5"], "-n is 4 on rank 0 and 5 on rank 1; the inputs' content is"),
        (["--backend", "reference,mlp=blas"], "--backend is reference on rank 0 and reference,mlp"),
        (["--batch-size", "2"], "--batch-size is 256 on rank 0 and 2 on rank 1"),
        (["--trim"], "--trim is not given on rank 0 and given on rank 1"),
        (["--warmup"], "--warmup is not given on rank 0 and given on rank 1"),
        (["--validate"], "--validate is not given on rank 0 and given on rank 1"),
        (["--transport", "pigeon"], "--transport is mpi on rank 0 and pigeon on rank 1"),
        (["--outputs", "out.bin"], "--outputs is not given on rank 0 and out.bin on rank 1"),
        (["--json", "-"], "--json is not given on rank 0 and - on rank 1"),
        (RANDOM, "--random-inputs is not given on rank 0 and 4 on rank 1;"),
    ],
)
def test_ranks_that_differ_in_an_option_are_told_which(
    arguments: list[str], says: str, facts_of: FactsOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        importlib.import_module("lfm2kit.cli.run"), "joined_job", lambda transport: None
    )
    refusal = compared([facts_of(), facts_of(*arguments)])
    assert refusal is not None
    assert f"do not agree: {says}" in refusal.sentence


def test_ranks_whose_loads_have_other_counts_do_not_run(facts_of: FactsOf, tmp_path: Path) -> None:
    """They would disagree about who holds an expert.  The files may have other names."""

    spec = open_checkpoint(find_model("tiny")).spec

    def written(name: str, first: int) -> Path:
        layers = tuple(one._replace(counts=(first, *one.counts[1:])) for one in unused(spec))
        load = Load("tiny", spec.embed_tokens.hidden_size, 10, layers)
        (tmp_path / name).write_text(json.dumps(load.document()))
        return tmp_path / name

    one, same, other = (
        facts_of("--ranks", "2", "--load", str(written(name, first)))
        for name, first in (("a", 1), ("b", 1), ("c", 2))
    )
    assert compared([one, same]) is None
    refusal = compared([one, other])
    assert refusal is not None
    assert re.search(r"do not agree: the load is \w{12} on rank 0 and \w{12} on", refusal.sentence)


def test_other_ids_are_noticed(facts_of: FactsOf) -> None:
    refusal = compared([facts_of(*RANDOM), facts_of(*RANDOM, "--seed", "3")])
    assert refusal is not None
    assert "--seed is 0 on rank 0 and 3 on rank 1; the inputs' content is" in refusal.sentence


def test_experts_on_the_cpu_are_a_part_of_the_plan(facts_of: FactsOf) -> None:
    pytest.importorskip("lfm2kit_cpu_simd", reason="it is where --n-cpu-moe puts experts")
    refusal = compared([facts_of(), facts_of("--n-cpu-moe", "1")])
    assert refusal is not None
    assert "--n-cpu-moe is 0 on rank 0 and 1 on rank 1" in refusal.sentence


def test_what_may_differ_between_nodes_is_not_compared(facts_of: FactsOf, tmp_path: Path) -> None:
    copy = shutil.copytree(find_model("tiny"), tmp_path / "tiny")
    shutil.copy(copy / "inputs.bin", tmp_path / "other.bin")
    own = facts_of("--model", str(copy), "--inputs", str(tmp_path / "other.bin"), "--threads", "1")
    assert compared([facts_of(), own]) is None


def test_ranks_never_share_a_memory_that_one_rank_uses_alone(
    facts_of: FactsOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HOST, "unit", lambda: "the one GPU", raising=False)
    refusal = compared([facts_of(), facts_of()])
    assert refusal is not None
    assert refusal.sentence.startswith("ranks 0, 1 would share the one GPU; give each rank")


def test_copies_that_a_launcher_started_run_with_independent_alone(
    facts_of: FactsOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PMI_SIZE", raising=False)
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(Lfm2kitError, match="srun started 4 processes"):
        facts_of()
    assert facts_of("--independent")["-n"] == Fact("4")


@pytest.mark.parametrize("command", ["run", "warmup"])
def test_a_job_is_not_started_by_a_process_that_is_to_run_alone(cli: Cli, command: str) -> None:
    """Each of its ranks would start a job again."""
    done = cli(command, "--ranks", 2, "--independent")
    assert done.code == 2
    assert done.err == (
        "lfm2kit: error: --ranks 2 starts a job, and --independent runs alone; "
        "give only one of them\n"
    )


class OneRank:
    """A transport of a job with a single rank."""

    world = World()

    def gather(self, rows: np.ndarray, counts: Any = None) -> np.ndarray:
        return rows

    def all_to_all(
        self, rows: np.ndarray, send_counts: Any, *known: Any
    ) -> tuple[np.ndarray, list[int]]:
        return rows, list(send_counts)

    def barrier(self) -> None:
        pass


def raising(error: Exception) -> Callable[[], Any]:
    def prepare() -> Any:
        raise error

    return prepare


def test_what_is_prepared_comes_back_where_the_ranks_agree() -> None:
    assert agreed(OneRank(), lambda: 7, lambda n: {"n": Fact(str(n))}) == 7


@pytest.mark.parametrize(
    ("error", "exit_code", "says"),
    [
        (Lfm2kitError("no such file: \x85"), 2, "lfm2kit: error: no such file: \\x85\n"),
        (KeyError("w1"), 3, "this is a bug: KeyError: 'w1'; its traceback: LFM2KIT_TRACEBACK=1\n"),
        (MemoryError("8 GB"), 2, "error: out of memory (MemoryError: 8 GB)\n"),
    ],
)
def test_what_goes_wrong_on_a_rank_is_one_line_and_the_exit_code_of_all(
    error: Exception, exit_code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as ended:
        agreed(OneRank(), raising(error), lambda prepared: {})
    assert ended.value.exit_code == exit_code
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.endswith(says)


@pytest.mark.parametrize(
    "option", ["--model", "--plan", "--inputs", "--answers", "--outputs", "--json"]
)
def test_ranks_are_given_no_path_that_leads_to_another_file_in_each(
    facts_of: FactsOf, option: str
) -> None:
    with pytest.raises(Lfm2kitError, match=f"{option} /dev/fd/1: each rank .* the name of a file"):
        facts_of("--ranks", "2", option, "/dev/fd/1")
