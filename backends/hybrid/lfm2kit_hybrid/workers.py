"""Threads that answer a channel's trips: they look for them during forwards, and sleep between.

Each forward that is served has a number, its *generation*.  Workers serve one generation, and then
wait for the next.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from threading import Condition, Thread, current_thread
from time import sleep
from typing import Any

import numpy as np
import numpy.typing as npt

from lfm2kit.backend import Channel
from lfm2kit.errors import Lfm2kitError
from lfm2kit_hybrid.calls import Called, Calls
from lfm2kit_hybrid.cores import bind, unbound
from lfm2kit_hybrid.polling import CALL, OVER, PATIENCE, observe, poll, publish

NAP = 0.02  # seconds between two looks of a worker whose patience is at its end
LEAVING = 1.0  # seconds that a worker gets to leave


class Workers:
    """The threads of one channel, which start when a call needs them."""

    def __init__(self, channel: Channel, cores: Sequence[int | None], deadline: float) -> None:
        self._channel = channel
        self._cores = cores
        self._deadline = deadline
        self._process = os.getpid()
        self._threads: list[Thread] = []
        self._condition = Condition()  # guards what follows
        self._generation = 0  # the newest one; a uint32, never 0
        self._is_serving = self._is_closed = False
        self._first = 0  # the newest trip when the generation began
        self._resting = 0  # threads that are neither in a call nor looking
        self._is_shaken = False  # a call of a forward that has failed may still be running
        self._failure: tuple[str, BaseException] | None = None  # a block's name, and what it raised
        # In memory that machine code reads: the generation that is served or 0, the table's
        # address, and each worker's newest trip, on cache lines of their own.
        self._serving = np.zeros(16, np.uint32)
        self._table = np.zeros(1, np.int64)
        self._seen = np.zeros((len(cores), 16), np.uint32)
        self._calls = Calls(self._take_table)

    def add(self, called: Called, parts: int) -> None:
        """Add a call that is shared by `parts` workers."""
        self._calls.add(called, parts)
        for worker in range(len(self._threads), parts):
            name = f"lfm2kit-hybrid-{worker}"
            self._threads.append(Thread(target=self._work, args=[worker], name=name, daemon=True))
            self._threads[worker].start()

    def begin(self) -> None:
        """Serve a forward.  Raises `Lfm2kitError` if a call of one that failed still runs."""
        if self._is_shaken:
            self._recover()
        with self._condition:
            self._generation = self._generation % (2**32 - 1) + 1
            self._first = observe(_address(self._channel.sent))
            self._is_serving = True
            publish(_address(self._serving), self._generation)
            self._condition.notify_all()

    def end(self) -> None:
        """Let the threads sleep."""
        with self._condition:
            self._is_serving = False
            publish(_address(self._serving), 0)

    def give_up(self) -> None:
        """Let the memory wait for nothing more in this forward."""
        self._is_shaken = True
        publish(_address(self._channel.failed), 1)

    def check(self) -> None:
        """Raise what a block has raised, or an error if the memory's deadline has passed."""
        late = int(self._channel.failed[1])
        if self._failure is None and not late:
            return
        self._is_shaken = True
        if self._failure is not None:
            raise _named(*self._failure)
        raise Lfm2kitError(
            f"{self._calls[late - 1].name}: no answer within {self._deadline:g} s; if it is only "
            "slow, give a longer --deadline"
        )

    def close(self) -> None:
        """End the threads, and give the channel back once nobody uses it."""
        if os.getpid() != self._process:
            return  # after a fork: there are no threads here, and perhaps a lock that nobody opens
        self.end()
        with self._condition:
            self._is_closed = True
            self._condition.notify_all()
        for thread in self._threads:
            if thread is not current_thread():  # the garbage collector may call this anywhere
                thread.join(LEAVING)
        if not any(thread.is_alive() for thread in self._threads):
            self._channel.close()

    def _recover(self) -> None:
        with self._condition:
            everybody = len(self._threads)
            if not self._condition.wait_for(lambda: self._resting == everybody, self._deadline):
                name = self._calls[int(self._channel.sent[1])].name
                raise Lfm2kitError(
                    f"{name}: it was called in a forward that has failed, and has not returned "
                    f"after {self._deadline:g} s more"
                )
            self._is_shaken, self._failure = False, None
            for i in range(2):
                publish(_address(self._channel.failed[i:]), 0)

    def _work(self, worker: int) -> None:
        bind(self._cores[worker])
        served = 0
        while True:
            with self._condition:
                self._resting += 1
                self._condition.notify_all()
                self._condition.wait_for(partial(self._is_called, served))
                self._resting -= 1
                if self._is_closed:
                    return
                served, self._seen[worker, 0] = self._generation, self._first
            self._serve(worker, served)

    def _is_called(self, served: int) -> bool:
        return self._is_closed or (self._is_serving and self._generation != served)

    def _serve(self, worker: int, generation: int) -> None:
        """Answer the trips of a generation."""
        channel = self._channel
        sent, failed = _address(channel.sent), _address(channel.failed)
        answered, seen = _address(channel.answered[worker]), _address(self._seen[worker])
        table, serving = _address(self._table), _address(self._serving)
        patience = PATIENCE
        while True:
            why = poll(sent, failed, answered, seen, table, serving, generation, worker, patience)
            patience = PATIENCE
            if why == OVER:
                return
            if why == CALL:
                self._call(worker)
            else:
                sleep(NAP)
                patience = 1

    def _call(self, worker: int) -> None:
        """Call a block that needs Python, and answer, whatever happens."""
        trip, number = (int(n) for n in self._channel.sent)
        called = self._calls[number]
        try:
            with unbound(self._cores[worker]):
                called()
        except BaseException as error:  # raised in the thread that runs the forward
            self._failure = self._failure or (called.name, error)
            publish(_address(self._channel.failed), 1)
        publish(_address(self._seen[worker]), trip)
        publish(_address(self._channel.answered[worker]), trip)

    def _take_table(self, table: npt.NDArray[Any]) -> None:
        self._table[0] = table.ctypes.data


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
