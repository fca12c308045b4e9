"""Streams that cannot take what is printed: stdout ends the command, and stderr ends nothing."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lfm2kit.building.loading import EMBEDDED
from lfm2kit.cli.report import Report
from lfm2kit.measuring import samples
from lfm2kit.process.streams import StdoutFailed
from tests.checkpoint.typed import Cli

LFM2KIT = [sys.executable, "-m", "lfm2kit"]
RUN = ["run", "-b", "reference", "-n", "1", "-v"]
PLAN = ["plan", "-b", "reference"]
FULL = "lfm2kit: error: stdout: No space left on device; the result could not be printed\n"
CLOSED = "lfm2kit: error: stdout is closed, and the result could not be printed; open it\n"


def shell(
    script: str, *words: object, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a line of bash, in which "$@" is lfm2kit with `words`."""
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", script, "bash", *LFM2KIT, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
        timeout=120,
    )


@pytest.mark.parametrize("words", [RUN, PLAN, ["--help"], ["env"]], ids=" ".join)
def test_a_full_disk_under_stdout_is_one_line_and_exit_code_2(words: list[str]) -> None:
    done = shell('"$@" > /dev/full', *words)
    assert (done.returncode, done.stderr) == (2, FULL)


@pytest.mark.parametrize(
    "words",
    [RUN, ["--help"], ["specs", "tiny"], pytest.param(PLAN, marks=pytest.mark.long)],
    ids=" ".join,
)
def test_a_closed_stdout_is_one_line_and_exit_code_2(words: list[str]) -> None:
    done = shell('"$@" >&-', *words)
    assert (done.returncode, done.stderr) == (2, CLOSED)
    assert shell('"$@" >&- 2>&-', *words).returncode == 2


@pytest.mark.parametrize("redirection", ["> /dev/full", ">&-"])
def test_work_that_cannot_be_shown_is_not_done(redirection: str, tmp_path: Path) -> None:
    files = ["--outputs", "outputs.bin", "--json", "report.json"]
    done = shell(f'"$@" {redirection}', *RUN, *files, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, FULL if "full" in redirection else CLOSED)
    assert list(tmp_path.iterdir()) == []
    words = ["generate", "a", "-b", "reference", "--max-tokens", "100", "--json", "report.json"]
    done = shell(f'"$@" {redirection}', *words, cwd=tmp_path)
    assert (done.returncode, "tokens/s" in done.stderr) == (2, False)
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_prints_nothing_needs_no_stdout(tmp_path: Path) -> None:
    done = shell('"$@" >&-', "convert", "tiny", "model.bin", cwd=tmp_path)
    assert done.returncode == 0
    assert (tmp_path / "model.bin").exists()


def test_a_stdout_that_fails_in_the_end_loses_no_file(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    line = Report.line

    def failing(self: Report, text: str = "") -> None:
        if text.startswith("Elapsed"):
            raise StdoutFailed(OSError(errno.ENOSPC, "No space left on device"))
        line(self, text)

    monkeypatch.setattr(Report, "line", failing)
    done = cli(*RUN, "--outputs", tmp_path / "outputs.bin")
    assert (done.code, done.err) == (2, FULL)
    assert samples.read_answers(tmp_path / "outputs.bin").shape[0] == 1


@pytest.mark.parametrize("redirection", ["2>&-", "<&- 2>&-", "2>/dev/full"])
def test_a_stderr_that_nobody_wants_changes_nothing(redirection: str, tmp_path: Path) -> None:
    done = shell(f'"$@" {redirection}', *RUN, "--outputs", "outputs.bin", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "VALID" in done.stdout.splitlines()
    assert samples.read_answers(tmp_path / "outputs.bin").shape[0] == 1  # and nothing else in it


def test_an_error_that_cannot_be_said_keeps_its_exit_code() -> None:
    assert shell('"$@" 2> /dev/full', "run", "-m", "nosuch").returncode == 2
    assert shell('"$@" 2>&-', "run", "-m", "nosuch").returncode == 2


@pytest.mark.parametrize("words", [RUN, ["run", "--help"]], ids=" ".join)
def test_a_reader_that_leaves_is_a_silent_end(words: list[str], tmp_path: Path) -> None:
    done = shell('"$@" | true', *words, "--outputs", "outputs.bin", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (141, "")
    assert list(tmp_path.iterdir()) == []


def test_a_remark_that_nobody_reads_ends_nothing(tmp_path: Path) -> None:
    done = shell('"$@" 2>&1 | true', "convert", "tiny", "model.bin", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "model.bin").exists()


@pytest.mark.parametrize(
    "encoding", ["latin-1", "ascii:strict", pytest.param("ascii", marks=pytest.mark.long)]
)
def test_a_terminal_of_few_characters_gets_others_in_their_place(
    encoding: str, tmp_path: Path
) -> None:
    name = os.fsdecode(b"caf\xe9 \xe6\xa8\xa1")
    shutil.copytree(EMBEDDED / "tiny", tmp_path / name)
    words = ["bench", "-b", "reference", "-n", "1", "-r", "1", "-m", tmp_path / name]
    done = shell('"$@" | iconv -f latin1 -t utf-8', *words, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert ("±" if encoding == "latin-1" else "+-") in done.stdout
    assert r"caf\udce9 \u6a21" in done.stdout
    assert shell('"$@"', *PLAN, PYTHONIOENCODING=encoding).returncode == 0


def test_a_path_that_is_not_utf_8_comes_back_from_json(tmp_path: Path) -> None:
    model = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(EMBEDDED / "tiny", model)
    done = shell('"$@"', *RUN, "-m", model, "--json", "-", LC_ALL="C")
    assert done.returncode == 0, done.stderr
    assert os.fsencode(json.loads(done.stdout)["model"]) == os.fsencode(model)
    assert r"caf\udce9" in done.stderr


def test_a_pipe_that_does_not_block_gets_everything() -> None:
    """As another process leaves a terminal that it shares with this one."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)  # less than what is printed at once
    with subprocess.Popen([*LFM2KIT, *PLAN, "--json", "-"], stdout=writer) as job:
        os.close(writer)
        with open(reader) as read:
            assert json.load(read)["kind"] == "lfm2kit plan"
    assert job.returncode == 0
