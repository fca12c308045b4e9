"""What fails once everything has been computed does not lose the result."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm2kit.building.loading import EMBEDDED
from lfm2kit.cli import suite
from lfm2kit.measuring import samples
from lfm2kit.outputs import files
from lfm2kit.testing import runner
from tests.checkpoint.typed import Cli, Typed

RUN = ["run", "-b", "reference", "-v", "-n", "1"]


@pytest.fixture
def wrong_answers(tmp_path: Path) -> Path:
    answers = np.array(samples.read_answers(EMBEDDED / "tiny" / "answers.bin"))
    samples.write_outputs(tmp_path / "answers.bin", answers + 1)
    return tmp_path / "answers.bin"


@pytest.fixture
def fills_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make /dev/full a disk that is full only once everything has been computed."""
    monkeypatch.setattr(files, "_check_device", lambda path: None)


def assert_said(done: Typed, verdict: str, *words: str) -> None:
    """Check that times and verdict are on stdout, and one line with the words on stderr."""
    lines = done.out.splitlines()
    assert verdict in lines
    for beginning in ("Elapsed time:", "Throughput:"):
        assert any(line.startswith(beginning) for line in lines)
    (line,) = done.err.splitlines()
    for word in words:
        assert word in line


@pytest.mark.usefixtures("fills_up")
def test_outputs_that_cannot_be_written_cost_neither_verdict_nor_report(
    cli: Cli, tmp_path: Path
) -> None:
    done = cli(*RUN, "--outputs", "/dev/full", "--json", tmp_path / "report")
    assert_said(done, "VALID", "/dev/full", "No space left")
    assert done.code == 2
    assert json.loads((tmp_path / "report").read_text())["validation"]["valid"]


@pytest.mark.usefixtures("fills_up")
def test_a_report_that_cannot_be_written_costs_no_outputs(cli: Cli, tmp_path: Path) -> None:
    done = cli(*RUN, "--outputs", tmp_path / "outputs.bin", "--json", "/dev/full")
    assert_said(done, "VALID", "/dev/full", "No space left")
    assert done.code == 2
    assert len(samples.read_answers(tmp_path / "outputs.bin")) == 1


@pytest.mark.usefixtures("fills_up")
def test_files_that_fail_together_are_named_in_one_line(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "full").symlink_to("/dev/full")
    done = cli(*RUN, "--outputs", tmp_path / "full", "--json", "/dev/full")
    assert_said(done, "VALID", str(tmp_path / "full"), "; /dev/full: No space left")


@pytest.mark.usefixtures("fills_up")
def test_wrong_outputs_that_cannot_be_written_are_still_invalid(
    cli: Cli, wrong_answers: Path
) -> None:
    done = cli(*RUN, "--answers", wrong_answers, "--outputs", "/dev/full")
    assert_said(done, "INVALID", "No space left")
    assert done.code == 1


@pytest.mark.usefixtures("fills_up")
def test_a_backend_that_fails_fails_even_where_the_report_cannot_be_written(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = runner.Result("rows", "failed", "wrong", 0.0)
    monkeypatch.setattr(suite, "run_checks", lambda *_, **__: [failed])
    done = cli("backends", "check", "reference", "--json", "/dev/full")
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "/dev/full: No space left" in done.err
    assert "1 failed" in done.out


@pytest.mark.parametrize(
    "words",
    [RUN, ["plan"], ["env"], ["backends", "list"], ["backends", "check", "reference"], ["warmup"],
     ["plugins"], ["transports", "check", "mpi"], ["calibrate"]],
    ids=" ".join,
)  # fmt: skip
def test_a_full_device_is_refused_before_any_work(cli: Cli, words: list[str]) -> None:
    cli(*words, "--json", "/dev/full").assert_fails("--json /dev/full", "No space left")


@pytest.mark.parametrize("option", ["--json", "--outputs", "--record-load"])
def test_a_full_disk_is_refused_before_any_work(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    (tmp_path / "new").mkdir()
    cli(*RUN, option, tmp_path / "new" / "file").assert_fails(option, "file", "No space left")
    assert not os.listdir(tmp_path / "new")


def test_lines_that_cannot_be_printed_cost_no_outputs(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*arguments: object) -> None:
        raise OSError("stdout is closed")

    monkeypatch.setattr(sys.modules["lfm2kit.cli.performing"], "conclude", closed)
    cli(*RUN, "--outputs", tmp_path / "outputs.bin")
    assert len(samples.read_answers(tmp_path / "outputs.bin")) == 1


def test_what_is_written_in_place_is_said_in_one_line(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "outputs.bin").write_bytes(b"old")
    os.link(tmp_path / "outputs.bin", tmp_path / "other")
    done = cli(*RUN, "--outputs", tmp_path / "outputs.bin")
    assert_said(done, "VALID", "outputs.bin is written in place")
    assert done.code == 0
    assert len(samples.read_answers(tmp_path / "other")) == 1


# ---- what cannot be mapped ----


@pytest.mark.parametrize("name", ["inputs.bin", "answers.bin"])
@pytest.mark.parametrize("given", [True, False])
def test_a_pipe_in_place_of_samples_is_refused_before_any_work(
    cli: Cli, tmp_path: Path, name: str, given: bool
) -> None:
    folder = Path(shutil.copytree(EMBEDDED / "tiny", tmp_path / "tiny"))
    (folder / name).unlink()
    os.mkfifo(folder / name)
    option = [f"--{Path(name).stem}", folder / name] if given else []
    cli(*RUN, "-m", folder, *option).assert_fails(str(folder / name), "pipe", "regular file")


@pytest.mark.parametrize("option", ["--inputs", "--answers"])
@pytest.mark.parametrize("kind", ["folder", "/dev/zero", "n" * 300, "missing"])
def test_nothing_but_a_file_is_taken_for_samples(
    cli: Cli, tmp_path: Path, option: str, kind: str
) -> None:
    (tmp_path / "folder").mkdir()
    cli(*RUN, option, tmp_path / kind).assert_fails(kind)


@pytest.fixture
def never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Make a file as /proc/kmsg is: regular, without a size, and reading it never ends."""
    opened = io.open

    def open_others(path: Any, *arguments: Any, **more: Any) -> Any:
        assert "kmsg" not in str(path), "it is opened"
        return opened(path, *arguments, **more)

    monkeypatch.setattr("builtins.open", open_others)
    monkeypatch.setattr("io.open", open_others)

    def made(name: str) -> Path:
        (tmp_path / name).touch()
        return tmp_path / name

    return made


@pytest.mark.parametrize("suffix", ["", ".bin", ".toml", ".safetensors", ".json"])
@pytest.mark.parametrize(
    "words",
    [["run", "--plan"], ["plan", "--plan"], ["warmup", "--plan"], ["run", "--inputs"],
     ["run", "--model"], ["specs"], ["convert", "TARGET"], ["convert", "TARGET", "--random"]],
    ids=" ".join,
)  # fmt: skip
def test_a_file_that_may_block_is_refused_unopened(
    cli: Cli, never_opened: Callable[[str], Path], words: list[str], suffix: str, tmp_path: Path
) -> None:
    path = never_opened(f"kmsg{suffix}")
    target = str(tmp_path / "new")
    command, *others = (word.replace("TARGET", target) for word in words)
    given = [path, *others] if command in ("specs", "convert") else [*others, path]
    cli(command, *given).assert_fails(str(path))
    assert not os.path.exists(target)


def test_answers_that_may_block_are_invalid_unopened(
    cli: Cli, never_opened: Callable[[str], Path]
) -> None:
    done = cli(*RUN, "--answers", never_opened("kmsg"))
    assert done.code == 1
    assert "0 bytes are too few for a header" in done.out


# ---- samples in two places ----


def test_samples_in_data_are_taken_and_the_others_named(cli: Cli, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(EMBEDDED / "tiny", tmp_path / "tiny"))
    (folder / "data").mkdir()
    for name in ("inputs.bin", "answers.bin"):
        shutil.copy(folder / name, folder / "data")
    done = cli(*RUN, "-m", folder)
    assert done.code == 0
    assert [line.split(": ")[1] for line in done.err.splitlines()] == [
        f"reading {folder}/data/{name}, not {folder}/{name}; give --{name[:-4]} FILE to choose"
        for name in ("inputs.bin", "answers.bin")
    ]
    assert cli(*RUN[:3], "-n", "1", "-m", folder, "--inputs", folder / "inputs.bin").err == ""


def test_one_file_in_both_places_is_no_remark(cli: Cli, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(EMBEDDED / "tiny", tmp_path / "tiny"))
    (folder / "data").mkdir()
    os.link(folder / "inputs.bin", folder / "data" / "inputs.bin")
    assert cli(*RUN[:3], "-n", "1", "-m", folder).err == ""
