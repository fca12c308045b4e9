"""Faults of ranks and of what started them: each ends the job, in one line and with no orphan."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.mpi import faulty

pytest.importorskip("lfm2kit_mpi", reason="the MPI transport is a distribution of its own")

from lfm2kit_mpi.launcher import find_mpiexec

pytestmark = pytest.mark.mpi
LFM2KIT = [sys.executable, "-m", "lfm2kit"]
RUN = ["run", "-n", "8", "--deadline", "2", "--backend", "reference,mlp=faulty"]
A_WHILE = 120  # seconds: a job that has not ended by then hangs
MARK = "TEST_OF_FAULTS"  # in the environment of each process of a job

BLOCK = r"layers\.0\.feed_forward: "
SILENT = "has said nothing for [0-9]+ s"
STILL = "no progress for [0-9]+ s"
# By fault: the exit code, and what the line says after "rank 1 on HOST, ".
EXPECTED = {
    "killed": (3, BLOCK + "its process was ended by signal 9 .SIGKILL."),
    "segfault": (3, BLOCK + "its process crashed: Segmentation fault"),
    "abort": (3, BLOCK + "its process crashed: Aborted"),
    "raises": (3, BLOCK + "RuntimeError: the second rank fails; .*LFM2KIT_TRACEBACK=1"),
    "raises-in-build": (3, "building " + BLOCK + "RuntimeError: no block of this"),
    "users-error": (2, BLOCK + "this rank has no such file"),
    "out-of-memory": (2, BLOCK + "out of memory .*1.00 PiB"),
    "exits-at-once": (3, BLOCK + "its process ended before its work was done"),
    "exits": (3, BLOCK + r"sys.exit\(0\) was called"),
    "stopped": (3, BLOCK + "its process is stopped, and " + SILENT),
    "loops": (3, BLOCK + STILL),
    "sleeps": (3, BLOCK + STILL),
    "holds-the-lock": (3, BLOCK + "it is hung or cut off, and " + SILENT),
}


class Ended(NamedTuple):
    """A job that has ended, and which of its processes were left then."""

    code: int
    out: str
    err: str
    left: list[int]


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> str:
    return faulty.install(tmp_path_factory.mktemp("faulty"))


def job(command: Sequence[str], plugin: str, fault: str, mark: str = "") -> Ended:
    variables = {"PYTHONPATH": plugin, faulty.FAULT: fault, MARK: mark or fault}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=A_WHILE, env=os.environ | variables
    )
    return Ended(done.returncode, done.stdout, done.stderr, marked(mark or fault))


def marked(mark: str) -> list[int]:
    """The processes that were started with this mark and have not ended."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def ended(plugin: str) -> dict[str, Ended]:
    """Every fault's job of two ranks; two at a time, as most of them only wait."""

    def run(fault: str) -> Ended:
        return job([*LFM2KIT, *RUN, "--ranks", "2"], plugin, fault)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(EXPECTED, pool.map(run, EXPECTED), strict=True))


@pytest.mark.parametrize("fault", EXPECTED)
def test_a_fault_of_one_rank_ends_the_job_with_one_line(
    fault: str, ended: dict[str, Ended]
) -> None:
    code, line = EXPECTED[fault]
    done = ended[fault]
    assert done.code == code, done.err
    assert re.fullmatch(rf"lfm2kit: error: rank 1 on \S+, {line}.*\n", done.err)
    assert "BAD TERMINATION" not in done.out
    assert done.left == []


def test_a_rank_that_never_joins_is_named(plugin: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time\n"
        "ranks = {os.environ.get(name) for name in ('PMI_RANK', 'OMPI_COMM_WORLD_RANK')}\n"
        "time.sleep(1000 if '1' in ranks else 0)\n"
    )
    path = os.pathsep.join([str(tmp_path), plugin])
    done = job([*LFM2KIT, *RUN, "--ranks", "2"], path, "", mark="never")
    assert done.code == 3
    assert re.fullmatch("lfm2kit: error: no word from rank 1 of 2 within 5 s: .*\n", done.err)
    assert done.left == []


@pytest.mark.parametrize("fault", ["killed", "users-error", "stopped"])
def test_under_a_launcher_of_one_s_own_the_line_is_said_and_no_rank_is_left(
    fault: str, plugin: str
) -> None:
    done = job([find_mpiexec(), "-n", "2", *LFM2KIT, *RUN], plugin, fault, mark=f"own-{fault}")
    assert done.code != 0
    lines = [line for line in done.err.splitlines() if line.startswith("lfm2kit: error:")]
    assert len(lines) == 1, done.err
    assert re.match(r"lfm2kit: error: rank 1 on \S+, " + BLOCK, lines[0])
    until_ended(f"own-{fault}")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_the_end_of_what_started_a_job_ends_every_rank(
    number: signal.Signals, tmp_path: Path
) -> None:
    path, mark = tmp_path / "outputs.bin", f"launcher-{number}"
    arguments = ["run", "--ranks", "2", "--backend", "reference", "--batch-size", "1"]
    with subprocess.Popen(
        [*LFM2KIT, *arguments, "--outputs", str(path)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ | {MARK: mark},
    ) as started:  # fmt: skip
        assert started.stdout is not None
        started.stdout.readline()  # rank 0 has introduced the run: all ranks are up
        assert len(marked(mark)) >= 4  # this process, mpiexec and two ranks
        started.send_signal(number)
        code = started.wait(A_WHILE)
    as_a_shell_says = code if code >= 0 else 128 - code
    assert as_a_shell_says == 128 + number
    until_ended(mark)
    assert list(tmp_path.iterdir()) == []


def until_ended(mark: str) -> None:
    end = time.monotonic() + A_WHILE
    while (left := marked(mark)) and time.monotonic() < end:
        time.sleep(0.05)
    assert left == []
