"""`lfm2kit run --record-load`: one file beside the other outputs, under the same rules."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from lfm2kit.building.load import read_load
from lfm2kit.building.loading import EMBEDDED
from lfm2kit.checkpoint import open_checkpoint
from lfm2kit.reference.backend import ReferenceBackend
from tests.checkpoint.typed import Cli

TINY = EMBEDDED / "tiny"


def test_the_timed_run_is_recorded_and_not_the_warm_up(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "load.json"
    done = cli("run", "-b", "reference", "-n", 3, "-v", "-w", "--record-load", path)
    assert (done.code, done.err) == (0, "")
    load = read_load(path)
    assert load.tokens == 3 * 16
    assert {sum(layer.counts) for layer in load.layers} == {4 * 3 * 16}
    load.check(path, open_checkpoint(TINY).spec)


def test_a_backend_that_captures_says_that_it_does_not(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class CapturingBackend(ReferenceBackend):
        def capture(self, step: Any, batch: Any) -> Any:
            raise AssertionError("a replay would count nothing")

    monkeypatch.setattr("lfm2kit.reference.backend.ReferenceBackend", CapturingBackend)
    path = tmp_path / "load.json"
    arguments = ("run", "-b", "reference", "-n", 4, "--batch-size", 1)
    done = cli(*arguments, "--record-load", path)
    assert done.code == 0
    assert "not captured, and slower: --record-load" in done.err
    assert read_load(path).tokens == 4 * 16


def test_it_is_refused_beside_a_rewrite_that_leaves_out_rows(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "load.json"
    run = ("run", "-b", "reference", "-n", 2, "--trim", "--record-load", path)
    cli(*run).assert_fails("'record-load' needs all rows, and 'trim' leaves some out")
    assert not path.exists()


def test_it_may_not_take_the_place_of_a_file_that_is_read(cli: Cli, tmp_path: Path) -> None:
    inputs, answers = tmp_path / "inputs", tmp_path / "answers"
    shutil.copy(TINY / "inputs.bin", inputs)
    shutil.copy(TINY / "answers.bin", answers)
    before = inputs.read_bytes()
    files = ("--inputs", inputs, "--answers", answers)
    run = ("run", "-b", "reference", "-v", *files, "--record-load")
    cli(*run, inputs).assert_fails("--record-load", "the inputs")
    cli(*run, answers).assert_fails("--record-load", "the answers")
    cli(*run, tmp_path / "a", "--json", tmp_path / "a").assert_fails("--json")
    cli(*run, tmp_path / "a", "--outputs", tmp_path / "a").assert_fails("as well")
    cli(*run, tmp_path).assert_fails("--record-load", "folder")
    assert inputs.read_bytes() == before
    assert not (tmp_path / "a").exists()
