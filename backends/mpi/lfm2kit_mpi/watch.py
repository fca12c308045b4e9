"""A rank's side of the watch: reports to the hub what the rank does, and ends when the hub says so.

Two threads do this beside the main one, which releases Python's lock while it waits in MPI.  The
connection binds a rank to its job: when it ends, because the hub's process was killed or a link was
cut, this process ends as well.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, NoReturn

from lfm2kit import progress
from lfm2kit.errors import BUG, Lfm2kitError
from lfm2kit.process.interrupts import PROCESS, SIGNALS
from lfm2kit_mpi.faults import STARTING, place
from lfm2kit_mpi.hub import proof
from lfm2kit_mpi.page import Page, new_page

BEAT = 0.25  # seconds between two reports to the hub
SOONEST = 0.05  # seconds between two reports of the main thread: steps may be much shorter
TO_CONNECT = 2.0  # seconds for an address to answer
TO_GREET = 10.0  # seconds for the hub to answer, once it is connected
LONGEST_SILENCE = 7 * 24 * 3600  # seconds: what Linux takes for an option of a connection
MOST_PROBES = 100
TO_UNWIND = 1.0  # seconds for partial files to be removed
TO_BE_ENDED = 5.0  # seconds that a rank with a fault leaves to the hub


class Watch:
    """This process's connection to the hub of its job."""

    def __init__(self, rank: int, link: socket.socket, words: BinaryIO, page: Page) -> None:
        self.rank = rank
        self._page = page
        self._collective: str | None = None  # that the main thread is in
        self._collectives = 0  # that this process has left
        self._collective_failed = False
        self._told = 0.0  # when
        self._told_long = False  # whether the step that was told may take longer than others
        self.is_done = False
        self._link = link
        self._words = words
        self._sending = threading.Lock()

    def start(self) -> None:
        """Begin to report and to listen; a crash of this process is reported as well."""
        faulthandler.enable(self._link.fileno(), all_threads=False)
        PROCESS.is_told = True  # an interrupt: by the hub, or by who sent it to all ranks
        progress.THIS_PROCESS.on_step = self._tell_in_time
        for work in (self._tell_again_and_again, self._listen):
            threading.Thread(target=work, daemon=True).start()

    @contextmanager
    def waiting_in(self, collective: str) -> Iterator[None]:
        """Mark a collective, in which this rank cannot go on before the others come."""
        self._collective = collective
        self._page.write(self._doing())
        try:
            with self.beside():
                yield
        finally:
            self._collective = None
            self._page.write(self._doing())

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Mark a collective in a thread beside the main one, which may go on meanwhile."""
        try:
            yield
        except Exception:
            self._collective_failed = True
            raise
        finally:
            self._collectives += 1

    def _tell_in_time(self) -> None:
        """Report the step that begins now; a block may then keep Python's lock for long."""
        _, name, seconds = progress.THIS_PROCESS.now
        self._page.write(name)
        is_long = seconds > progress.THIS_PROCESS.deadline
        if is_long or self._told_long or time.monotonic() - self._told > SOONEST:
            self.tell()

    def tell(self) -> None:
        """Report what this process is doing now."""
        number, _, seconds = progress.THIS_PROCESS.now
        self._told, self._told_long = time.monotonic(), seconds > progress.THIS_PROCESS.deadline
        self.send(
            count=[number, self._collectives], is_waiting=self._collective is not None,
            doing=self._doing(), seconds=seconds,
        )  # fmt: skip

    def _doing(self) -> str:
        name = progress.THIS_PROCESS.now.name
        return name if self._collective is None else f"waiting in {self._collective} after {name}"

    def send(self, **message: Any) -> None:
        with self._sending, suppress(OSError):  # a broken link: `_listen` sees it
            self._link.sendall(json.dumps(message).encode() + b"\n")

    def done(self, exit_code: int) -> None:
        self.tell()
        self.is_done = True
        self.send(done=exit_code)

    def report(self, exit_code: int, reason: str, details: str) -> None:
        """Report why this rank ends.

        Another rank's end may be the cause if this one was told to end or a collective failed: a
        launcher ends the ranks that remain, and MPI may see that a rank is gone.
        """
        is_effect = exit_code - 128 in SIGNALS or self._collective_failed
        self.tell()
        self.send(reason=reason, exit_code=exit_code, details=details, is_effect=is_effect)

    def abort(self, exit_code: int, reason: str, details: str) -> NoReturn:
        """Report why the job ends, and wait for the hub to end this process."""
        self.report(exit_code, reason, details)
        time.sleep(TO_BE_ENDED)
        os._exit(exit_code)

    def _tell_again_and_again(self) -> None:
        while not self.is_done:
            self.tell()
            time.sleep(BEAT)

    def _listen(self) -> None:
        """Wait for the hub's order to end, or for the end of the connection."""
        said = b""
        with suppress(OSError):
            said = self._words.readline()
        if not said and self.is_done:
            return  # the hub may go first
        if not said and self.rank == 1:  # one line of a job; rank 0 and its hub may be lost
            _complain("the watch over this job is gone, with rank 0's machine or the launcher")
        _end_process(json.loads(said)["end"] if said else BUG)


def joined(rank: int, where: Sequence[str], port: int, key: str) -> Watch:
    """Connect this rank to the hub at one of the addresses `where`."""
    page = new_page()
    page.write(progress.THIS_PROCESS.now.name)
    for address in where:
        with suppress(OSError, ValueError):
            link = socket.create_connection((address, port), TO_CONNECT)
            link.settimeout(TO_GREET)
            words = link.makefile("rb")
            nonce = words.readline().decode().strip()
            hello = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid()}
            hello |= {"place": place(), "page": page.fd, "proof": proof(key, nonce)}
            link.sendall(json.dumps(hello).encode() + b"\n")
            if words.readline() == b"welcome\n":
                link.settimeout(None)
                notice_cuts(link, progress.THIS_PROCESS.deadline)
                return Watch(rank, link, words, page)
            link.close()
    raise Lfm2kitError(
        f"rank {rank} on {socket.gethostname()} cannot reach the process that watches this job: "
        f"tried port {port} at {', '.join(where)}. Let the machines of a job talk over TCP"
    )


def starting_seconds() -> float:
    """Return how long MPI's start may take; it waits for every rank, and holds Python's lock."""
    return progress.THIS_PROCESS.deadline + 2 * STARTING


def notice_cuts(link: socket.socket, seconds: float) -> None:
    """Make the system end a connection whose other end has not answered for `seconds`."""
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    seconds = min(seconds, LONGEST_SILENCE)
    interval = math.ceil(seconds / MOST_PROBES)
    wanted = {
        "TCP_KEEPIDLE": interval,
        "TCP_KEEPINTVL": interval,
        "TCP_KEEPCNT": math.ceil(seconds / interval),
        "TCP_USER_TIMEOUT": math.ceil(1000 * seconds),
    }
    for name, value in wanted.items():
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _end_process(exit_code: int) -> NoReturn:
    """End this process from another thread, and let it remove partial files first."""
    with suppress(OSError):  # the fault has been reported: print nothing more
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
    PROCESS.end(exit_code)
    time.sleep(TO_UNWIND)
    os._exit(exit_code)


def _complain(sentence: str) -> None:
    with suppress(OSError):
        os.write(2, f"lfm2kit: error: {sentence}\n".encode())
        sys.stderr.flush()
