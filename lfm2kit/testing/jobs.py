"""Checks of the jobs that a transport's launcher starts, for `lfm2kit transports check`.

A check starts a job.  Each rank joins it and does the check's part for ranks, and the process that
has started the job judges how it ended.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import NamedTuple, NoReturn

import numpy as np

from lfm2kit import progress
from lfm2kit.errors import USER_ERROR, WRONG_RESULT, Lfm2kitError, choices
from lfm2kit.memory import HOST, Memory
from lfm2kit.testing.runner import Result, Verdict
from lfm2kit.testing.transports import check_exchange, check_transport
from lfm2kit.testing.verdicts import CheckFailed
from lfm2kit.transport import JobError, Launcher, Transport

EXIT_CODE = 5  # that no part of lfm2kit has
REASON = "this rank gives up"
STUCK = 2.0  # seconds without progress that a job of a rank that hangs may take
PATIENCE = 60.0  # seconds for a job to start, and to end once it should


class Ended(NamedTuple):
    """The end of a job: rank 0's exit code, or the fault that its launcher reports."""

    exit_code: int | None
    fault: JobError | None = None


class JobCheck(NamedTuple):
    """What each rank does, and whether the job has ended as it should."""

    on_rank: Callable[[Transport, Memory], None]
    judge: Callable[[Ended], None]  # raises CheckFailed
    deadline: float = progress.DEADLINE


class TimeUp(KeyboardInterrupt):
    """An interrupt of a launcher whose job does not end."""


def selected(only: Iterable[str] | None) -> list[str]:
    """Return the ids of the checks to run, in order; raise `Lfm2kitError` for an unknown id."""
    wanted = set(JOB_CHECKS) if only is None else {name.strip() for name in only}
    for name in sorted(wanted - set(JOB_CHECKS)):
        raise Lfm2kitError(f"unknown check '{name}'; {choices(name, JOB_CHECKS)}")
    return [name for name in JOB_CHECKS if name in wanted]


def judged(name: str, launch: Callable[[], int], patience: float = PATIENCE) -> Result:
    """Return the result of one check, whose job `launch` starts and waits for.

    A job that has not ended `patience` seconds after its deadline is interrupted.  Raise
    `Lfm2kitError` if no job can be started here.
    """
    check, start = JOB_CHECKS[name], time.perf_counter()
    verdict: Verdict = "passed"
    detail = ""
    try:
        with _interrupted_after(check.deadline + patience):
            ended = _ended(launch)
        check.judge(ended)
    except TimeUp:
        verdict, detail = "failed", f"the job had not ended after {check.deadline + patience:g} s"
    except CheckFailed as failure:
        verdict, detail = "failed", str(failure)
    except Lfm2kitError:
        raise
    except Exception as error:  # whatever a launcher raises is a verdict on it
        first_line = (str(error).splitlines() or [""])[0]
        verdict, detail = "failed", f"launch raised {type(error).__name__}: {first_line}"
    return Result(name, verdict, detail, time.perf_counter() - start)


def run_job_check(
    name: str, transport: str, launcher: Launcher, ranks: int, backend: str | None = None
) -> Result:
    """Return the result of a check, in a job of `ranks` ranks of this command line."""
    before = progress.THIS_PROCESS.deadline
    progress.set_deadline(JOB_CHECKS[name].deadline)
    words = ["transports", "rank", transport, name, str(ranks)]
    arguments = words if backend is None else [*words, backend]
    try:
        return judged(name, partial(launcher.launch, ranks, arguments))
    finally:
        progress.set_deadline(before)


def run_on_rank(name: str, transport: Transport, memory: Memory = HOST) -> None:
    """Do a rank's part of a check; a breach that it finds ends the job."""
    try:
        JOB_CHECKS[name].on_rank(transport, memory)
    except CheckFailed as failure:
        transport.abort(WRONG_RESULT, str(failure))


def joined(launcher: Launcher, ranks: int) -> Transport:
    """Return the transport of a rank of a check; raise `Lfm2kitError` outside of any job."""
    size = launcher.world_size()
    if size is None:
        raise Lfm2kitError("this process is not a rank; type lfm2kit transports check")
    transport = launcher.connect()
    if {size, transport.world.size} != {ranks}:
        said = f"world_size() says {size} and world.size {transport.world.size}"
        transport.abort(WRONG_RESULT, f"{said} in a job of {ranks} ranks")
    return transport


def _ended(launch: Callable[[], int]) -> Ended:
    try:
        return Ended(launch())
    except JobError as fault:
        return Ended(None, fault)


@contextmanager
def _interrupted_after(seconds: float) -> Iterator[None]:
    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise TimeUp

    handler = signal.signal(signal.SIGALRM, interrupt)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)  # somebody else's


def _require_good(ended: Ended) -> None:
    if ended.fault is not None:
        raise CheckFailed(str(ended.fault))
    _require_exit_code(ended, 0)


def _require_exit_code(ended: Ended, exit_code: int) -> None:
    if ended != (exit_code, None):
        said = f"returned {ended.exit_code}" if ended.fault is None else f"raised: {ended.fault}"
        raise CheckFailed(f"rank 0 finished with {exit_code}, but launch {said}")


def _require_fault(ended: Ended, of: str) -> JobError:
    if ended.fault is None:
        raise CheckFailed(f"launch returned {ended.exit_code}, although {of}")
    return ended.fault


def _places(transport: Transport, memory: Memory) -> None:
    """Check that the ranks of a job are numbered, and those of a machine as well."""
    world = transport.world
    if not 0 <= world.local_rank < world.local_size <= world.size:
        raise CheckFailed(f"local_rank {world.local_rank} and local_size {world.local_size}")
    ranks = transport.gather(np.array([world.rank], np.int64))
    if ranks is not None and ranks.tolist() != list(range(world.size)):
        raise CheckFailed(f"{world.size} ranks gathered their numbers as {ranks.tolist()}")


def _collectives(transport: Transport, memory: Memory) -> None:
    check_transport(transport)


def _exchange(transport: Transport, memory: Memory) -> None:
    check_exchange(transport, memory)


def _good(transport: Transport, memory: Memory) -> None:
    transport.barrier()


def _last_gives_up(transport: Transport, memory: Memory) -> None:
    if _is_last(transport):
        transport.abort(USER_ERROR, REASON)
    transport.barrier()


def _last_leaves(transport: Transport, memory: Memory) -> None:
    if _is_last(transport):
        os._exit(0)
    transport.barrier()


def _last_hangs(transport: Transport, memory: Memory) -> None:
    progress.step("a step that does not end")
    if _is_last(transport):
        time.sleep(STUCK + PATIENCE)
    transport.barrier()


def _is_last(transport: Transport) -> bool:
    return transport.world.rank == transport.world.size - 1


def _judge_abort(ended: Ended) -> None:
    fault = _require_fault(ended, "the last rank called abort")
    if fault.exit_code != USER_ERROR or REASON not in str(fault):
        raise CheckFailed(
            f"the last rank called abort({USER_ERROR}, {REASON!r}), and launch raised "
            f"JobError({str(fault)!r}, {fault.exit_code})"
        )


def _judge_early_end(ended: Ended) -> None:
    _require_fault(ended, "the last rank's process ended before finish was called there")


def _judge_hang(ended: Ended) -> None:
    _require_fault(ended, f"the last rank made no progress for more than {STUCK:g} s")


JOB_CHECKS = {
    "places": JobCheck(_places, _require_good),
    "collectives": JobCheck(_collectives, _require_good),
    "exchange": JobCheck(_exchange, _require_good),
    "exit-code": JobCheck(_good, lambda ended: _require_exit_code(ended, EXIT_CODE)),
    "abort": JobCheck(_last_gives_up, _judge_abort),
    "early-end": JobCheck(_last_leaves, _judge_early_end),
    "hang": JobCheck(_last_hangs, _judge_hang, STUCK),
}


def exit_code_of(name: str, transport: Transport) -> int:
    """Return the exit code that a rank finishes a check with."""
    return EXIT_CODE if name == "exit-code" and transport.world.rank == 0 else 0
