"""A server in plain Python: what the contract of crossings asks for, without any speed.

It judges memories with signals, and shows how a backend's own server may begin.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Thread
from typing import Any

import numpy as np

from lfm2kit.backend import ArrayForm, Block, Call, Channel, Ordered, first_call

LOOK = 2e-5  # seconds between two looks at what was sent
Answer = Callable[[Call, int], None]  # fills one worker's share of a call's results


class SimpleServer:
    """Threads that live as long as a forward, and answer the trips of a channel."""

    def __init__(self, channel: Channel, workers: int = 1, pause: Callable[[], Any] = int) -> None:
        self.channel = channel
        self.workers = workers
        self.failure: tuple[str, BaseException] | None = None
        self._pause = pause  # called before a worker answers
        self._calls: list[tuple[str, Call, Answer]] = []
        self._is_over = True

    @contextmanager
    def serving(self) -> Iterator[None]:
        self.failure = None
        self.channel.failed[:] = 0  # the memory is idle: the last forward has ended
        self._is_over = False
        newest = int(self.channel.sent[0])
        threads = [Thread(target=self._work, args=[i, newest]) for i in range(self.workers)]
        for thread in threads:
            thread.start()
        try:
            yield
        except BaseException:
            self.channel.failed[0] = 1  # nothing more is waited for
            raise
        finally:
            self._is_over = True
            for thread in threads:
                thread.join()
        self._check()

    def call(
        self,
        name: str,
        answer: Answer,
        inputs: Sequence[ArrayForm],
        results: Sequence[ArrayForm],
        workers: int = 1,
    ) -> Call:
        """Return a new call of the channel, which `answer` answers."""
        call = self.channel.call(inputs, results, workers)
        self._calls.append((name, call, answer))
        return call

    def _check(self) -> None:
        if self.failure is not None:
            name, error = self.failure
            raise RuntimeError(f"{name} raised {type(error).__name__}: {error}") from error
        if self.channel.failed[1]:
            name = self._calls[int(self.channel.failed[1]) - 1][0]
            raise RuntimeError(f"{name} has not answered in time")

    def _work(self, worker: int, seen: int) -> None:
        while not self._is_over:
            trip = int(self.channel.sent[0])
            if trip == seen:
                time.sleep(LOOK)
                continue
            seen = trip
            self._answer(worker, int(self.channel.sent[1]))
            self.channel.answered[worker, 0] = trip

    def _answer(self, worker: int, number: int) -> None:
        name, call, answer = self._calls[number]
        self._pause()
        if self.channel.failed.any():
            return
        try:
            answer(call, worker)
        except Exception as error:
            self.failure = name, error
            self.channel.failed[0] = 1


def _unheard(is_over: bool) -> None:
    """Be told of a wait that nobody wants to hear of."""


class SimpleCrossing:
    """A block of the host's memory, called from `outer` by a simple server's first worker."""

    def __init__(self, name: str, block: Block, outer: Ordered, server: SimpleServer) -> None:
        self.server = server
        self._name = name
        self._block = block
        self._outer = outer
        self._calls: dict[Any, tuple[Call, bool]] = {}
        self._told: Callable[[bool], None] = _unheard  # of waits

    def tell_waits(self, told: Callable[[bool], None] | None) -> None:
        self._told = told or _unheard

    def __call__(self, *inputs: Any) -> Any:
        shapes = tuple(array.shape for array in inputs)
        if shapes not in self._calls:
            return self._first(shapes, inputs)
        call, is_tuple = self._calls[shapes]
        call.send(*inputs)
        self._told(False)
        results = call.receive()
        self._told(True)
        return results if is_tuple else results[0]

    def _first(self, shapes: Any, inputs: Sequence[Any]) -> Any:
        first = first_call(self._block, self._outer, inputs)
        call = self.server.call(self._name, self._answer, first.inputs, first.results)
        self._calls[shapes] = call, isinstance(first.result, tuple)
        return first.result

    def _answer(self, call: Call, worker: int) -> None:
        if worker > 0:
            return
        result = self._block(*call.inputs)
        for target, array in zip(
            call.results, result if isinstance(result, tuple) else (result,), strict=True
        ):
            np.copyto(target, array, casting="no")
