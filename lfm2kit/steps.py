"""Forwards in steps, so that several can take turns: one computes while another's tokens travel.

A block that has to wait in its midst may have `steps(*inputs)` beside its call.  This generator
yields each call that can be made elsewhere, and is sent its result; it returns what the block's
call returns.  The yielded call takes the number of the forward among those under way: 0 for one
that runs by itself, 1, 2, ... for those that take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

from lfm2kit.pending import Pending

T = TypeVar("T")
Steps = Generator[Callable[[int], Any], Any, T]


def stepped(block: Callable[..., Any], *inputs: Any) -> Steps[Any]:
    """Go through a block's steps, and return its result; a block without steps is called."""
    steps = getattr(block, "steps", None)
    if steps is None:
        return block(*inputs)
    return (yield from steps(*inputs))


def finished(steps: Steps[T]) -> T:
    """Return the result of a forward that runs by itself."""
    result = None
    while True:
        try:
            call = steps.send(result)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        result = call(0)


def alternately(
    forwards: Sequence[Steps[T]], begin: Callable[[Callable[[], Any]], Pending]
) -> list[T]:
    """Return the results of forwards that take turns, each step in the order of `forwards`.

    `begin` begins what one of them has yielded, and meanwhile the next one computes.  All have
    equally many steps, so that calls are begun in the same order on every rank.
    """
    pending: list[Pending | None] = [None] * len(forwards)
    results: dict[int, T] = {}
    while len(results) < len(forwards):
        for i, steps in enumerate(forwards):
            before = pending[i]
            try:
                call = steps.send(None if before is None else before.end())
            except StopIteration as end:
                results[i] = end.value
            else:
                pending[i] = begin(partial(call, i + 1))
    return [results[i] for i in range(len(forwards))]


class Times(NamedTuple):
    """The seconds that a forward computed before each call that it yielded, and that this took."""

    computing: list[float]
    calls: list[float]


def timed(steps: Steps[T]) -> tuple[T, Times]:
    """Return the result of a forward that runs by itself, and its times."""
    result, times = None, Times([], [])
    while True:
        start = time.perf_counter()
        try:
            call = steps.send(result)
        except StopIteration as end:
            return end.value, times
        yielded = time.perf_counter()
        result = call(0)
        times.computing.append(yielded - start)
        times.calls.append(time.perf_counter() - yielded)
