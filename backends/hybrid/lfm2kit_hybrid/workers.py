"""Threads that answer a channel's trips: they look for them during forwards, and sleep between.

They are in machine code (`polling.poll`) from their start to their end, except while a block needs
Python.  So the thread that runs forwards never waits for Python's lock because of them.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Sequence
from itertools import count
from threading import Thread
from typing import Any
from weakref import WeakSet

import numpy.typing as npt
from lfm2kit_cpu_simd.crew import CREW

from lfm2kit.backend import Channel
from lfm2kit.errors import Lfm2kitError, Option
from lfm2kit.progress import longest_of
from lfm2kit_hybrid import polling
from lfm2kit_hybrid.board import CLOSED, NOTED, SEEN, SERVING, Board
from lfm2kit_hybrid.calls import Called, Calls
from lfm2kit_hybrid.cores import bind, unbound
from lfm2kit_hybrid.polling import (
    CALL,
    LINGER,
    PATIENCE,
    PAUSES,
    call_back,
    observe,
    poll,
    publish,
    wake,
)

LEAVING = 1.0  # seconds that a worker gets to leave
LOOK = 1e-3  # seconds between two looks at whether the calls of a failed forward have returned

_OPEN: WeakSet[Workers] = WeakSet()  # that are not closed


@atexit.register
def _close_all() -> None:
    for workers in list(_OPEN):
        workers.end_with_process()


class Workers:
    """The threads of one channel, which start when a call needs them."""

    def __init__(
        self,
        channel: Channel,
        cores: Sequence[int | None],
        block_threads: int | None = None,
    ) -> None:
        self._block_threads = block_threads
        self._channel = channel
        self._cores = cores
        self._process = os.getpid()
        self._threads: list[Thread] = []
        self._is_shaken = False  # a call of a forward that has failed may still be running
        self._failure: tuple[str, BaseException] | None = None  # a block's name, and what it raised
        self._leavers = count()  # of one after the other
        self._board = Board(len(cores), observe(_address(channel.sent)))
        self._calls = Calls(self._take_table)
        self._names: set[str] = set()  # of the blocks that are called
        _OPEN.add(self)

    def add(self, called: Called, parts: int) -> None:
        """Add a call that is shared by `parts` workers.

        Raises `Lfm2kitError` if the system gives a thread or a pipe no more; the next call may try
        again.
        """
        self._calls.add(called, parts)
        self._names.add(called.name)
        for worker in range(len(self._threads), parts):
            try:
                self._start(worker)
            except (OSError, RuntimeError) as error:
                raise Lfm2kitError(
                    f"{called.name}: thread {worker + 1} of the {parts} that share it cannot start "
                    f"({error}); see ulimit -n and ulimit -u"
                ) from error

    def begin(self) -> None:
        """Serve a forward.  Raises `Lfm2kitError` if a call of one that failed still runs.

        A block may take as long as steps of its name may by now.  Marks of failure are looked at as
        well: a second interrupt may have come before `give_up`.
        """
        self._channel.deadline[0] = longest_of(self._names)
        if self._is_shaken or self._channel.failed.any():
            self._recover()
        polling.begin(self._board.address)

    def end(self) -> None:
        """Let the threads sleep."""
        polling.end(self._board.address)

    def give_up(self) -> None:
        """Let the memory wait for nothing more in this forward."""
        self._is_shaken = True
        publish(_address(self._channel.failed), 1)

    def check(self) -> None:
        """Raise what a block has raised, or an error if the memory's deadline has passed."""
        late = int(self._channel.failed[1])
        failure, self._failure = self._failure, None  # whoever catches it says how long it lives
        if failure is None and not late:
            return
        self._is_shaken = True
        if failure is not None:
            raise _named(*failure)
        raise Lfm2kitError(
            f"{self._calls[late - 1].name}: no answer within {self._deadline():g} s; if it is only "
            "slow, give a longer ",
            Option("deadline"),
        )

    def close(self) -> None:
        """Tell the threads to end, and do not wait for them.

        The garbage collector calls this wherever it is at work, and an interrupt that comes while
        it does is lost.
        """
        if os.getpid() != self._process:
            return  # after a fork: there are no threads here, and the pipes are another process's
        _OPEN.discard(self)
        publish(self._board.address + CLOSED, 1)
        self._wake_all()
        self._leave()

    def _leave(self) -> None:
        """Give the channel back if all threads, and who closes it, have left."""
        if next(self._leavers) == len(self._threads):
            self._channel.close()
            self._board.close()

    def end_with_process(self) -> None:
        """Let the threads end while what they look at is still there."""
        self.close()
        for thread in self._threads:
            thread.join(LEAVING)

    def _recover(self) -> None:
        """Wait until nobody is in a call of a forward that has failed, and forget that it has."""
        self._wake_all()
        end = time.monotonic() + self._deadline()
        while not self._have_left():
            if time.monotonic() > end:
                name = self._calls[int(self._channel.sent[1])].name
                raise Lfm2kitError(
                    f"{name}: it was called in a forward that has failed, and has not returned "
                    f"after {self._deadline():g} s more"
                )
            time.sleep(LOOK)
        self._is_shaken, self._failure = False, None
        self._board.have_seen(observe(_address(self._channel.sent)))
        for i in range(2):
            publish(_address(self._channel.failed[i:]), 0)

    def _deadline(self) -> float:
        return float(self._channel.deadline[0])

    def _have_left(self) -> bool:
        """Return whether all workers know that the forward has ended."""
        board = self._board
        return all(
            observe(board.address + board.of(worker, NOTED)) == board[SERVING]
            for worker in range(len(self._threads))
        )

    def _wake_all(self) -> None:
        for worker in range(len(self._threads)):
            wake(self._board.address, worker)

    def _start(self, worker: int) -> None:
        self._board.open(worker)
        name = f"lfm2kit-hybrid-{worker}"
        thread = Thread(target=self._work, args=[worker], name=name, daemon=True)
        self._threads.append(thread)  # before: after an interrupt in `start`, it runs
        try:
            thread.start()
        except RuntimeError:
            self._threads.pop()
            raise

    def _work(self, worker: int) -> None:
        bind(self._cores[worker])
        if self._block_threads is not None:
            CREW.hire(min(self._block_threads, CREW.size()))
        channel = self._channel
        sent, failed, answered = map(
            _address, (channel.sent, channel.failed, channel.answered[worker])
        )
        pauses = PAUSES if self._cores[worker] is None else PATIENCE
        board = self._board.address
        while poll(board, sent, failed, answered, worker, pauses, LINGER, PATIENCE) == CALL:
            self._call(worker)
        self._leave()

    def _call(self, worker: int) -> None:
        """Call a block that needs Python, and answer, whatever happens.

        Python's lock may have come late.  If the forward has failed meanwhile, the memory goes on
        and writes over the arguments: experts sorted by ids that change would read anywhere.
        """
        trip, number, rows = (int(n) for n in self._channel.sent)
        name = f"call {number}"
        try:
            called = self._calls[number]
            name = called.name
            if not self._channel.failed.any():
                with unbound(self._cores[worker]):
                    called(rows)
        except BaseException as error:  # raised in the thread that runs the forward
            self._failure = self._failure or (name, error)
            publish(_address(self._channel.failed), 1)
        publish(self._board.address + self._board.of(worker, SEEN), trip)
        publish(_address(self._channel.answered[worker]), trip)
        call_back(self._board.address)

    def _take_table(self, table: npt.NDArray[Any]) -> None:
        self._board.set_table(_address(table))


def _named(name: str, error: BaseException) -> BaseException:
    """Return an error that names the block which raised it."""
    if isinstance(error, Lfm2kitError):
        named: BaseException = Lfm2kitError(f"{name}: ", *error.args)
    elif isinstance(error, MemoryError):
        named = MemoryError(f"{name}: {error}")
    else:
        named = RuntimeError(f"{name} raised {type(error).__name__}: {error}")
    named.__cause__ = error
    return named


def _address(array: npt.NDArray[Any]) -> int:
    return array.ctypes.data
