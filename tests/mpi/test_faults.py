"""Faults of ranks and of what started them: each ends the job, in one line and with no orphan."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.mpi import faulty

pytest.importorskip("lfm2kit_mpi", reason="the MPI transport is a distribution of its own")

from lfm2kit_mpi.launcher import find_mpiexec

pytestmark = pytest.mark.mpi
# Open MPI refuses root, and more ranks than cores, unless told.
LETS_ANYONE_RUN = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}
LFM2KIT = [sys.executable, "-m", "lfm2kit"]
RUN = ["run", "-n", "2", "--deadline", "4", "--backend", "reference,mlp=faulty"]
A_WHILE = 120  # seconds: a job that has not ended by then hangs
MARK = "TEST_OF_FAULTS"  # in the environment of each process of a job

# Shared memory of its own for a job, where that can be had: what is left there is printed.
OWN_SHM = [
    "unshare", "--mount", "sh", "-c",
    'mount -t tmpfs none /dev/shm || exit; "$@"; code=$?; ls /dev/shm | sed "s/^/left: /"; '
    "exit $code",
    "sh",
]  # fmt: skip

WHO = r"lfm2kit: error: rank 1 on \S+, "
BLOCK = WHO + r"layers\.0\.feed_forward: "
SILENT = "has said nothing for [0-9]+ s"
STILL = "no progress for [0-9]+ s"
# By fault: the exit code, and how the line begins.
EXPECTED = {
    "killed": (3, BLOCK + "its process was ended by signal 9 .SIGKILL."),
    "segfault": (3, BLOCK + "its process crashed: Segmentation fault"),
    "abort": (3, BLOCK + "its process crashed: Aborted"),
    "raises": (3, BLOCK + "RuntimeError: the second rank fails; .*LFM2KIT_TRACEBACK=1"),
    "raises-in-build": (
        3,
        WHO + r"building layers\.0\.feed_forward: RuntimeError: no block of this",
    ),
    "users-error": (2, BLOCK + "this rank has no such file"),
    "out-of-memory": (2, BLOCK + "there is not enough memory .*1.00 PiB"),
    "exits-at-once": (3, BLOCK + "its process ended before its work was done"),
    "exits": (3, BLOCK + r"sys.exit\(0\) was called"),
    "stopped": (3, BLOCK + "its process is stopped, and " + SILENT),
    "loops": (3, BLOCK + STILL),
    "holds-the-lock": (3, BLOCK + "it is hung or cut off, and " + SILENT),
    "never-joins": (3, "lfm2kit: error: no word from rank 1 of 2 within 7 s: "),
}
UNDER_ANOTHER_LAUNCHER = ["killed", "segfault", "users-error", "stopped"]


class Ended(NamedTuple):
    """A job that has ended, and which of its processes were left then."""

    code: int
    out: str
    err: str
    left: list[int]


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> str:
    return faulty.install(tmp_path_factory.mktemp("faulty"))


def job(before: Sequence[str], after: Sequence[str], plugin: str, fault: str) -> Ended:
    mark = f"{os.getpid()} {fault} {before} {after}"
    path = os.pathsep.join(filter(None, [plugin, os.environ.get("PYTHONPATH")]))
    variables = LETS_ANYONE_RUN | {"PYTHONPATH": path, faulty.FAULT: fault, MARK: mark}
    done = subprocess.run(
        [*before, *LFM2KIT, *RUN, *after],
        capture_output=True, text=True, timeout=A_WHILE, env=os.environ | variables,
    )  # fmt: skip
    if not after:  # another launcher ends first, and the hub beside rank 0 a little later
        until_ended(mark)
    return Ended(done.returncode, done.stdout, done.stderr, marked(mark))


def own_shm() -> list[str]:
    """Return what a command begins with to have a /dev/shm of its own, if that is possible."""
    try:
        can = subprocess.run([*OWN_SHM, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return []
    return OWN_SHM if can else []


def marked(mark: str) -> list[int]:
    """Return the processes that were started with this mark and have not ended."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


class Case(NamedTuple):
    """A fault, and whether we start the job, with `--ranks`."""

    fault: str
    is_ours: bool


# The likes of these are tested each time: ranks that are killed, raise, end, or say nothing.
LIKE_OTHERS = "abort segfault out-of-memory exits loops raises-in-build holds-the-lock"
LONG = {Case(fault, True) for fault in LIKE_OTHERS.split()}
LONG |= {Case(fault, False) for fault in ("segfault", "users-error", "stopped")}


def cases(faults: Iterable[str], is_ours: bool) -> list[Any]:
    """Return the parameters of a test."""
    some = [Case(fault, is_ours) for fault in faults]
    return [pytest.param(c, id=c.fault, marks=pytest.mark.long if c in LONG else ()) for c in some]


@pytest.fixture(scope="module")
def ended(plugin: str, request: pytest.FixtureRequest) -> dict[Case, Ended]:
    """Run the jobs of the cases that are tested, some at a time, as most of them only wait."""
    parameters = [getattr(item, "callspec", None) for item in request.session.items]
    chosen = [p.params["case"] for p in parameters if p and isinstance(p.params.get("case"), Case)]
    before = {True: own_shm(), False: [find_mpiexec(), "-n", "2"]}
    after = {True: ["--ranks", "2"], False: []}

    def run(case: Case) -> Ended:
        return job(before[case.is_ours], after[case.is_ours], plugin, case.fault)

    with ThreadPoolExecutor(3) as pool:
        return dict(zip(chosen, pool.map(run, chosen), strict=True))


@pytest.mark.parametrize("case", cases(EXPECTED, is_ours=True))
def test_a_fault_of_one_rank_ends_the_job_with_one_line(
    case: Case, ended: dict[Case, Ended]
) -> None:
    code, line = EXPECTED[case.fault]
    done = ended[case]
    assert done.code == code, done.err
    assert re.fullmatch(f"{line}.*\n", done.err)
    assert "BAD TERMINATION" not in done.out
    assert "left: " not in done.out
    assert done.left == []


@pytest.mark.parametrize("case", cases(UNDER_ANOTHER_LAUNCHER, is_ours=False))
def test_under_another_launcher_the_line_is_said_and_no_rank_is_left(
    case: Case, ended: dict[Case, Ended]
) -> None:
    done = ended[case]
    assert done.code != 0
    (line,) = (line for line in done.err.splitlines() if line.startswith("lfm2kit: error:"))
    assert re.match(BLOCK, line)
    assert done.left == []


def ended_late(faults: list[str], plugin: str, *arguments: str) -> dict[str, Ended]:
    """Run a job for each fault, of the experts of layer 3: after its ranks' first operations."""
    late = [*arguments, "--backend", "reference,3.experts=faulty"]

    def run(fault: str) -> Ended:
        return job(own_shm(), late, plugin, fault)

    with ThreadPoolExecutor(3) as pool:
        return dict(zip(faults, pool.map(run, faults), strict=True))


def assert_named(fault: str, done: Ended) -> None:
    """Assert that a job with a fault of layer 3's experts has ended, and says so in one line."""
    code, line = EXPECTED[fault]
    assert done.code == code, done.err
    expected = line.replace(BLOCK, WHO + r"layers\.3\.feed_forward\.experts: ")
    assert re.fullmatch(f"{expected}.*\n", done.err)
    assert "left: " not in done.out
    assert done.left == []


IN_A_GROUP = ["exits-at-once", "loops"]  # one that is noticed at once, and one by the deadline


@pytest.fixture(scope="module")
def ended_in_a_group(plugin: str) -> dict[str, Ended]:
    """Run jobs of two groups; rank 0 waits for rank 1 in a collective of theirs alone.

    The deadline is longer than that of other jobs: eight processes start at once.
    """
    more = ["-n", "4", "--ranks", "4", "--ep-size", "2", "--deadline", "6"]
    return ended_late(IN_A_GROUP, plugin, *more)


@pytest.mark.long
@pytest.mark.parametrize("fault", IN_A_GROUP)
def test_a_fault_in_one_group_ends_the_job_with_one_line_that_names_the_rank(
    fault: str, ended_in_a_group: dict[str, Ended]
) -> None:
    assert_named(fault, ended_in_a_group[fault])


@pytest.mark.parametrize("fault", ["loops", pytest.param("raises", marks=pytest.mark.long)])
def test_a_fault_while_tokens_travel_ends_the_job_with_one_line_that_names_the_rank(
    fault: str, plugin: str
) -> None:
    """The tokens of each rank travel when one of them fails."""
    ended = ended_late([fault], plugin, "-n", "8", "--ranks", "2", "--overlap", "on")
    assert_named(fault, ended[fault])


@pytest.mark.long
def test_a_rank_does_not_wait_for_ever_for_one_that_runs_another_command() -> None:
    """Without rank 0 nobody watches, and MPI's start lets no thread run."""
    other, waiting = [*LFM2KIT, "plan"], [*LFM2KIT, *RUN]
    done = subprocess.run(
        [find_mpiexec(), "-n", "1", *other, ":", "-n", "1", *waiting],
        capture_output=True, text=True, timeout=A_WHILE, env=os.environ | LETS_ANYONE_RUN,
    )  # fmt: skip
    assert done.returncode != 0


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGHUP, marks=pytest.mark.long),  # is handled as SIGTERM is
        signal.SIGTERM,
        signal.SIGINT,
    ],
)
def test_the_end_of_what_started_a_job_ends_every_rank(
    number: signal.Signals, tmp_path: Path
) -> None:
    path, mark = tmp_path / "outputs.bin", f"{os.getpid()} launcher {number}"
    arguments = ["run", "--ranks", "2", "--backend", "reference", "--batch-size", "2"]
    arguments += ["--overlap", "on"]
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
    until(lambda: not marked(mark))


def until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + A_WHILE
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.05)
