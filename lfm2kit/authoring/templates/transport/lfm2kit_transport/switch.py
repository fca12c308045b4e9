"""Runs a job: starts its ranks, passes parts on between them, and watches over them.

Each rank has a thread here, which receives its messages.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from lfm2kit.errors import BUG
from lfm2kit.progress import DEADLINE, Step
from lfm2kit.transport import JobError

LOOK = 0.02  # seconds between two looks at the ranks


class Rank:
    """A rank's process, and what is known of it."""

    def __init__(
        self, process: subprocess.Popen[bytes], connection: Connection[Any, Any]
    ) -> None:
        self.process = process
        self.connection = connection
        self.step = Step(0, "starting", DEADLINE)
        self.moved = time.monotonic()  # when its step began, or a swap ended
        self.is_waiting = False  # in a swap, for the others
        self.exit_code: int | None = None  # once its work is done


class Switch:
    def __init__(self, ranks: Sequence[Rank]) -> None:
        self.ranks = ranks
        self.fault: JobError | None = None
        self._parts: list[Sequence[Any]] = [()] * len(ranks)
        self._all = threading.Barrier(len(ranks))

    def run(self) -> int:
        """Return the exit code that rank 0 finishes with, or raise `JobError`."""
        numbers = range(len(self.ranks))
        threads = [
            threading.Thread(target=self._listen, args=[i], daemon=True)
            for i in numbers
        ]
        for thread in threads:
            thread.start()
        try:
            while self.fault is None and any(one.is_alive() for one in threads):
                self._look()
                time.sleep(LOOK)
        finally:
            self._all.abort()  # ends threads that wait
        if self.fault is not None:
            raise self.fault
        exit_code = self.ranks[0].exit_code
        assert exit_code is not None
        return exit_code

    def _listen(self, number: int) -> None:
        """Receive a rank's messages until its process ends."""
        rank = self.ranks[number]
        try:
            with suppress(EOFError, OSError, threading.BrokenBarrierError):
                while True:
                    self._take(number, *rank.connection.recv())
        finally:
            if rank.exit_code is None:
                self._fail(number, "its process ended before its work was done")

    def _take(self, number: int, kind: str, *message: Any) -> None:
        rank = self.ranks[number]
        if kind == "step":
            if message[0].number != rank.step.number:
                rank.moved = time.monotonic()
            rank.step = message[0]
        elif kind == "swap":
            self._swap(number, *message)
        elif kind == "finish":
            rank.moved, rank.exit_code = time.monotonic(), message[0]
        else:
            exit_code, reason, details = message
            self._fail(number, reason, exit_code, details)

    def _swap(self, number: int, parts: Sequence[Any]) -> None:
        """Wait for the parts of all ranks, and send a rank those that are for it."""
        rank = self.ranks[number]
        rank.is_waiting, self._parts[number] = True, parts
        self._all.wait()
        came = [parts[number] for parts in self._parts]
        rank.is_waiting, rank.moved = False, time.monotonic()
        self._all.wait()  # nobody brings the next parts before all have these
        rank.connection.send(came)

    def _look(self) -> None:
        """Find a rank that keeps the others waiting, or waits for nobody."""
        is_any_done = any(rank.exit_code is not None for rank in self.ranks)
        for number, rank in enumerate(self.ranks):
            is_alive, seconds = rank.process.poll() is None, rank.step.seconds
            is_late = time.monotonic() - rank.moved > seconds
            if rank.is_waiting and not is_alive:
                self._fail(number, "its process ended while it waited for the others")
            elif rank.is_waiting and is_any_done:
                self._fail(number, "it waits for a rank whose work is done")
            elif not rank.is_waiting and is_alive and is_late:
                said = f"no progress for {seconds:.0f} s"
                self._fail(number, f"{rank.step.name}: {said}")

    def _fail(
        self, number: int, reason: str, exit_code: int = BUG, details: str = ""
    ) -> None:
        """Keep the first reason: others may follow from it."""
        said = f"rank {number} of {len(self.ranks)}: {reason}"
        self.fault = self.fault or JobError(said, exit_code, details)


def run_job(ranks: int, command: Sequence[str], variable: str) -> int:
    """Run `command` on each of `ranks` ranks; `variable` tells each its place."""
    started: list[Rank] = []
    try:
        for number in range(ranks):
            started.append(_started(number, ranks, command, variable))
        return Switch(started).run()
    finally:
        for rank in started:
            rank.process.kill()
            rank.process.wait()


def _started(number: int, ranks: int, command: Sequence[str], variable: str) -> Rank:
    """Start a rank in a session of its own: Ctrl-C is for the launching process."""
    ours, its = Pipe()
    with its:  # only the rank keeps it open, so that its end is seen here
        place = {variable: f"{number} {ranks} {its.fileno()}"}
        process = subprocess.Popen(
            command,
            env=os.environ | place,
            pass_fds=[its.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    return Rank(process, ours)
