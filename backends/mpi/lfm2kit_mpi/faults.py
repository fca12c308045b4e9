"""Decides which rank of a job is at fault, from what the ranks last reported."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from lfm2kit.errors import BUG
from lfm2kit_mpi.page import Reader

OF_LAUNCHERS = {None, signal.SIGTERM, signal.SIGKILL}  # with which they end the other ranks
SILENT = 1.0  # seconds: a rank that can report does so more often
STARTING = 3.0  # seconds beyond the deadline, for a rank to start and send its first report


class Fault(NamedTuple):
    """The reason why a job ends without a result, and its exit code."""

    sentence: str
    exit_code: int = BUG
    details: str = ""  # a traceback, where there is one


@dataclass(slots=True)
class Rank:
    """The last report of a rank; times are those of the process that listens."""

    number: int
    host: str
    pid: int
    place: str  # the kernel and the process namespace that `pid` belongs to
    heard: float  # when its last report came
    moved: float  # when it last began a step, or entered or left a collective
    doing: str = "starting"
    is_waiting: bool = False  # in a collective: it cannot go on before the others come
    seconds: float = 0.0  # how long its step may take
    is_done: bool = False
    ended_by: Fault | None = None  # what it says of its end, if others may have caused that
    last_words: str = ""  # what Python's fault handler wrote as the process crashed
    page: Reader | None = None  # what it is doing at this moment, if it runs on this machine
    count: list[int] = field(default_factory=list)

    @property
    def where(self) -> str:
        doing = self.page.read() if self.page is not None else self.doing
        return f"rank {self.number} on {self.host}, {doing}"

    def tell(self, now: float, count: list[int], doing: str, is_waiting: bool) -> None:
        """Take in a report; `count` differs from the last one if the rank has made progress."""
        self.doing, self.is_waiting = doing, is_waiting
        if count != self.count:
            self.count, self.moved = count, now


def stuck(ranks: Iterable[Rank], now: float) -> Fault | None:
    """Return the fault of a rank that is silent or makes no progress; None if there is none.

    A rank that waits in a collective is not to blame as long as another may still arrive there.
    """
    working = [rank for rank in ranks if not rank.is_done]
    for rank in working:
        if rank.last_words:  # writing a core file may take longer than any deadline
            return gone(rank)
        quiet, still = now - rank.heard, now - rank.moved
        if quiet > rank.seconds or (still > rank.seconds and not rank.is_waiting):
            said = _silence(rank, quiet) if quiet > SILENT else _no_progress(still)
            return Fault(f"{rank.where}: {said}")
    if working and all(rank.is_waiting and now - rank.moved > rank.seconds for rank in working):
        first = min(working, key=lambda rank: rank.moved)
        return Fault(
            f"{first.where}: no progress for {now - first.moved:.0f} s, and every other rank waits "
            "too; a connection between two of them is cut, or they do not make the same calls"
        )
    return None


def lingering(ranks: Iterable[Rank], now: float, seconds: float) -> Fault | None:
    """Return the fault of `ranks` that have not ended `seconds` after all ranks were done."""
    last = max(ranks, key=lambda rank: rank.heard, default=None)
    if last is None or now - last.heard <= seconds:
        return None
    return Fault(f"{last.where}: its work is done, but it has not ended for {seconds:.0f} s")


def not_joined(size: int, joined: Iterable[int], seconds: float) -> Fault:
    missing = sorted(set(range(size)) - set(joined))
    names = ("rank " if len(missing) == 1 else "ranks ") + ", ".join(map(str, missing))
    return Fault(
        f"no word from {names} of {size} within {seconds:.0f} s: the job is not complete; "
        "if starting takes longer here, give a longer --deadline"
    )


def culprit(
    left: Sequence[Rank], ranks: Iterable[Rank], number: int | None, pid: int | None
) -> Fault | None:
    """Return the fault of a job in which ranks have ended, and none has reported one of its own.

    `left` are those that ended early, the first one first; the signal `number` ended the process
    `pid`.  One end leads to others: launchers kill the ranks that remain, and these lose their
    connections.  So a crash counts most, then a signal that no launcher sends, then the first end,
    and least what a rank says that others made end.
    """
    crashed = [rank for rank in left if rank.last_words]
    signalled = [rank for rank in left if rank.pid == pid and number not in OF_LAUNCHERS]
    for rank in (*crashed, *signalled, *(rank for rank in left if rank.ended_by is None)):
        return gone(rank, number if rank.pid == pid else None)
    return next((rank.ended_by for rank in ranks if rank.ended_by is not None), None)


def gone(rank: Rank, number: int | None = None) -> Fault:
    """Return the fault of a rank that ended before it was done; `number` is the signal's."""
    if rank.last_words:
        return Fault(f"{rank.where}: its process crashed: {rank.last_words}")
    if number is not None:
        return Fault(f"{rank.where}: its process was {by_signal(number)}")
    return Fault(f"{rank.where}: its process ended before its work was done")


def by_signal(number: int) -> str:
    """Say how the signal `number` ended a process, as the end of a sentence."""
    name = signal.Signals(number).name if number in signal.valid_signals() else "unknown"
    of_memory = ", as the system does where memory runs out" if name == "SIGKILL" else ""
    return f"ended by signal {number} ({name}){of_memory}"


def _silence(rank: Rank, seconds: float) -> str:
    state = "its process is stopped" if is_stopped(rank) else "it is hung or cut off"
    return f"{state}, and has said nothing for {seconds:.0f} s"


def _no_progress(seconds: float) -> str:
    return f"no progress for {seconds:.0f} s; if it is only slow, give a longer --deadline"


def place() -> str:
    """Return the kernel and the process namespace in which this process has its id."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def is_stopped(rank: Rank) -> bool:
    """Return whether the rank's process runs on this machine and was stopped by a signal."""
    if not rank.place or rank.place != place():
        return False
    try:
        stat = Path("/proc", str(rank.pid), "stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] in ("T", "t")
