"""Runs a job: starts mpiexec and the hub, and leaves no process behind."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from lfm2kit import progress
from lfm2kit.errors import Lfm2kitError
from lfm2kit.transport import JobError
from lfm2kit_mpi import hub as hubs
from lfm2kit_mpi.faults import Fault, by_signal, place
from lfm2kit_mpi.hub import LOOK, Hub, until
from lfm2kit_mpi.shared_memory import drop_names_of

STDIN = "LFM2KIT_MPI_STDIN"  # for rank 0: which process has the stdin of the job
HUB = "LFM2KIT_MPI_HUB"  # for the ranks: where the hub listens, and the job's key
TO_SAY_WHY = 1.0  # seconds for mpiexec to say which signal ended a rank
TO_END = 2.0  # seconds for a job's processes to end when told to
LINES = r"(?:(?!-{70}).*\n)*"
# What Open MPI says, between lines of dashes, of a rank that ended by itself and has said why.
ON_EXIT_CODES = re.compile(rf"^-{{70,}}\n{LINES}?.*non-zero{LINES}-{{70,}}\n", re.MULTILINE)


def run_job(command: Sequence[str], ranks: int) -> int:
    """Run `command`, which starts `ranks` ranks, and return rank 0's exit code.

    Raise `JobError` if the job ends before rank 0, and `Lfm2kitError` if no rank starts.
    """
    hub = Hub(ranks, progress.THIS_PROCESS.deadline, hubs.new_key())
    hub.pass_on = _print
    with tempfile.TemporaryFile() as said, hubs.listening() as listener:
        told = f"{','.join(hubs.addresses())} {listener.getsockname()[1]} {hub.key}"
        # Outside of asyncio, whose way of ending tasks an interrupt would cut short.
        with _started(command, {HUB: told}, said) as job:
            exit_code = asyncio.run(_watched(hub, listener, job, said))
        # Warnings of mpiexec and of C libraries.
        if words := ON_EXIT_CODES.sub("", _words_of(said)):
            print(words, end="", file=sys.stderr, flush=True)
        return exit_code


async def _watched(
    hub: Hub, listener: socket.socket, job: subprocess.Popen[bytes], said: BinaryIO
) -> int:
    server = await asyncio.start_server(hub.serve, sock=listener, limit=hubs.LONGEST_LINE)
    while job.poll() is None and not hub.is_over:
        hub.look()
        await asyncio.sleep(LOOK)
    try:
        return await _concluded(hub, job, said)
    finally:
        server.close()


async def _concluded(hub: Hub, job: subprocess.Popen[bytes], said: BinaryIO) -> int:
    """Return rank 0's exit code if the job has no fault."""
    if hub.broken is not None:
        raise hub.broken
    if hub.fault is None:
        patience = TO_SAY_WHY if hub.is_cut_short else hub.deadline
        await until(lambda: job.poll() is not None, patience)
        await hub.hear_out()
    words = _words_of(said)
    number = _number("signal", words)
    fault = hub.explain(number, _number("PID", words))
    if fault is None and hub.exit_code is not None:
        return hub.exit_code
    if fault is None and not hub.ranks and number is not None:
        fault = Fault(f"a rank's process was {by_signal(number)}, before it had joined the job")
    if fault is None and not hub.ranks:
        raise Lfm2kitError(f"mpiexec started no rank: {_last_line(words)}")
    if fault is None:
        ended = f"the job ended before rank 0 was done: {_last_line(words)}"
        fault = Fault(ended, details=words)
    hub.end_ranks(fault.exit_code)
    await until(lambda: job.poll() is not None, TO_SAY_WHY)
    raise JobError(*fault)


@contextlib.contextmanager
def _started(
    command: Sequence[str], variables: dict[str, str], said: BinaryIO
) -> Iterator[subprocess.Popen[bytes]]:
    """Start the job's mpiexec, and end all processes of the job when the block ends."""
    marker = "=".join(*variables.items()).encode()
    # mpiexec reads no stdin: MPICH's fails if it has more than 64 KB before a rank reads it.
    environment = os.environ | variables | {STDIN: f"{os.getpid()} {place()}"}
    # A session of its own: an interrupt is passed on once, by us, and reaches every process.
    job = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said,
        start_new_session=True, preexec_fn=_ending_with_this_process(),
    )  # fmt: skip
    try:
        yield job
    finally:
        if job.poll() is None:
            drop_names_of(_processes_with(marker))
            job.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.wait(TO_END)
        _kill_all(job, marker)


def _kill_all(job: subprocess.Popen[bytes], marker: bytes) -> None:
    """Kill every process of the job on this machine, including stopped ones."""
    until = time.monotonic() + TO_END
    while (left := _processes_with(marker)) and time.monotonic() < until:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    job.poll()
    if job.returncode is None:
        job.kill()
        job.wait()


def _processes_with(marker: bytes) -> list[int]:
    """Return the processes of this machine that have `marker` in their environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if marker in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


def _ending_with_this_process() -> Callable[[], None] | None:
    """Return a function that makes Linux end a child when this process is killed."""
    if sys.platform != "linux":
        return None
    prctl, set_signal = ctypes.CDLL(None).prctl, 1  # PR_SET_PDEATHSIG
    return lambda: prctl(set_signal, signal.SIGTERM)


def _print(stream: str, data: bytes) -> None:
    out = sys.stdout if stream == "stdout" else sys.stderr
    out.buffer.write(data)
    out.flush()


def _words_of(said: BinaryIO) -> str:
    said.seek(0)
    return said.read().decode(errors="replace")


def _number(word: str, text: str) -> int | None:
    """Find the number after `word`: "EXIT STRING: Killed (signal 9)", "PID 4711 RUNNING AT n1"."""
    found = re.search(rf"\b{word} (\d+)", text)
    return int(found[1]) if found else None


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip(" -=\t")]
    return lines[-1] if lines else "it said nothing"
