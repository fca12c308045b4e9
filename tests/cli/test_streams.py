"""Streams that cannot take what is printed: the work is done, and the exit code stays true."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lfm2kit.building.loading import EMBEDDED
from lfm2kit.measuring import samples

LFM2KIT = [sys.executable, "-m", "lfm2kit"]
RUN = ["run", "-b", "reference", "-n", "1", "-v"]
PLAN = ["plan", "-b", "reference"]
FULL = "lfm2kit: error: stdout: No space left on device; the result could not be printed\n"


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


def wrong_answers(folder: Path) -> Path:
    path = Path(shutil.copy(EMBEDDED / "tiny" / "answers.bin", folder))
    logits = np.array(samples.read_answers(path))
    logits[0, 0] += 1
    samples.write_outputs(path, logits)
    return path


@pytest.mark.parametrize("words", [RUN, PLAN, ["--help"], ["env"]], ids=" ".join)
def test_a_full_disk_under_stdout_is_one_line_and_exit_code_2(words: list[str]) -> None:
    done = shell('"$@" > /dev/full', *words)
    assert (done.returncode, done.stderr) == (2, FULL)


def test_what_cannot_be_printed_loses_no_file_and_no_verdict(tmp_path: Path) -> None:
    files = ["--outputs", "outputs.bin", "--json", "report.json"]
    answers = ["--answers", wrong_answers(tmp_path)]
    done = shell('"$@" > /dev/full', *RUN, *files, *answers, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, FULL)
    assert json.loads((tmp_path / "report.json").read_text())["validation"]["valid"] is False
    assert (tmp_path / "outputs.bin").stat().st_size > 0


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_a_stream_that_nobody_wants_changes_nothing(redirection: str, tmp_path: Path) -> None:
    done = shell(f'"$@" {redirection}', *RUN, "--outputs", "outputs.bin", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert ("VALID" in done.stdout.splitlines()) == (">&-" not in redirection.replace("2>&-", ""))
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


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "ascii:strict"])
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
            assert json.load(read)["copies"] == 0
    assert job.returncode == 0
