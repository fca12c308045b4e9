"""`lfm2kit bench --ranks`: which jobs it starts, and what is wrong in one line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from lfm2kit.cli import scaling
from lfm2kit.records import values
from tests.checkpoint.typed import Cli


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Return the command lines of jobs, which end at once."""
    lines: list[list[str]] = []

    def end(arguments: Sequence[str]) -> dict[str, Any]:
        lines.append(list(arguments))
        ranks = int(arguments[arguments.index("--ranks") + 1])
        made = {"backend": "reference", "precision": "fp32", "notes": ["slow"], "ranks": ranks}
        time = {"name": "time", "unit": "s", "better": "lower", "values": [1.0 / ranks]}
        made |= {"machine": {"devices": {"loom": {"device": "L1"}}}, "figures": [time]}
        return made | {"groups": [[0]], "finite": ranks < 4}

    monkeypatch.setattr(scaling, "_record", end)
    return lines


def test_each_job_runs_what_was_asked_for(cli: Cli, started: list[list[str]]) -> None:
    asked = ["--threads", 1, "--trim", "--seed", 3, "--ep-size", 2, "--seq-len", 4, "-r", 1]
    assert cli("bench", "-b", "reference", "--ranks", "2", "-n", 8, *asked).code == 0
    (line,) = started
    assert " ".join(line) == (
        "run --threads 1 --ep-size 2 --seed 3 --trim --random-inputs 4 --transport mpi "
        "--backend reference --ranks 2 -n 8 --batch-size 8 --warmup --json -"
    )


def test_jobs_are_interleaved_and_compared(cli: Cli, started: list[list[str]]) -> None:
    done = cli("bench", "--ranks", "1,2", "-n", "8,16", "-r", 2, "-b", "reference", "--json", "-")
    assert done.code == 0
    assert [line[line.index("--ranks") + 1] for line in started] == ["1", "2"] * 4
    record = json.loads(done.out)
    rows = record["results"]
    assert [row["figure"] for row in rows] == [figure["name"] for figure in record["figures"]]
    assert values(record, "model 16x16 on 2 ranks") == [0.5, 0.5]
    assert record["machine"]["devices"] == {"loom": {"device": "L1"}}
    assert [row["speed_up"] for row in rows] == [1.0, 2.0, 1.0, 2.0]
    assert [row["test"] for row in rows] == ["model 8x16"] * 2 + ["model 16x16"] * 2
    assert rows[0]["parts"] == {"compute": 1.0, "exchange": 0.0, "waiting": 0.0}
    assert rows[1]["parts"] is None
    assert done.err.count("slow") == 1


def test_what_is_repeated_is_measured_once(cli: Cli, started: list[list[str]]) -> None:
    twice = ["-b", "reference", "-b", "reference", "-n", "8,16,8"]
    done = cli("bench", "--ranks", "2,1,2", *twice, "-r", 1, "--json", "-")
    assert [line[line.index("--ranks") + 1] for line in started] == ["2", "1"] * 2
    assert len(json.loads(done.out)["results"]) == 4
    blocks = ("--block", "conv", "--block", "conv")
    done = cli("bench", *blocks, *twice, "-r", 1, "--seq-len", 1, "--json", "-")
    assert len(json.loads(done.out)["results"]) == 2


def test_a_job_whose_logits_are_not_finite_is_named(cli: Cli, started: list[list[str]]) -> None:
    done = cli("bench", "--ranks", "2,4", "-n", 8, "-r", 1, "-b", "reference")
    assert done.code == 1
    assert "not finite in 1 of 2 rows (reference: model 8x16 on 4 ranks)" in done.err
    assert done.out.count("\n") == 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--ranks", "1,x"], "--ranks 1,x: expected whole numbers of 1 or more, such as 1,2,4"),
        (["--ranks", "0"], "--ranks 0: expected whole numbers"),
        (["--ranks", "2", "--decode"], "--ranks measures the whole model; leave out --decode"),
        (["--ranks", "2", "--seq-len", "4,8"], "--seq-len 4,8: with --ranks it takes one number"),
        (["--ranks", "2", "--transport", "pigeon"], "unknown transport 'pigeon'"),
        (["--ranks", "2", "--model", "nosuch"], "no model 'nosuch'"),
        (["--ep-size", "2"], "--ep-size needs --ranks, such as --ranks 2"),
        (["--parallel", "dp"], "--parallel needs --ranks, such as --ranks 2"),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: list[str], says: str, cli: Cli, started: list[list[str]]
) -> None:
    done = cli("bench", "-b", "reference", *arguments)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert says in done.err
    assert not started


def test_ranks_inside_a_job_are_refused(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMI_SIZE", "2")
    done = cli("bench", "--ranks", "2")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert "this is a rank of a job of 2" in done.err
