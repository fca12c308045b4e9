"""`lfm2kit profile`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.checkpoint.typed import Cli

FORWARD = ("profile", "-b", "reference", "-n", "2", "--seq-len", "4", "-r", "2")


def test_a_profile_is_shown_and_written(cli: Cli, random_folder: Path, tmp_path: Path) -> None:
    record, trace = tmp_path / "record.json", tmp_path / "trace.json"
    done = cli(*FORWARD, "-m", random_folder, "--json", record, "--trace", trace)
    assert done.code == 0, done.err
    assert "reference: a forward of 2 samples of 4 tokens takes" in done.out
    assert "between blocks" in done.out
    written = json.loads(record.read_text(encoding="utf-8"))
    assert len(written["parts"]) == 42
    assert written["parts"][3]["name"] == "layers.0.ffn_norm"
    assert {kind["kind"] for kind in written["kinds"]} >= {"experts", "router", "attn"}
    assert json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]


def test_a_step_is_named(cli: Cli, random_folder: Path) -> None:
    done = cli(*FORWARD, "-m", random_folder, "--decode", "--json", "-")
    assert done.code == 0, done.err
    assert json.loads(done.out)["test"] == "a step of 2 sequences after 4 tokens"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("-n", "0"), "-n 0"),
        (("-r", "0"), "--repetitions 0"),
        (("--trace", "no/such/trace.json"), "--trace no/such"),
        (("--trace", "same.json", "--json", "same.json"), "same.json"),
        (("--rewrite", "trim", "--decode"), "--decode"),
    ],
)
def test_bad_input_is_one_line(
    given: tuple[str, ...], says: str, cli: Cli, random_folder: Path
) -> None:
    cli("profile", "-b", "reference", "-m", random_folder, *given).assert_fails(says)
