"""Calls that are made beside the thread that begins them, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from threading import Thread
from typing import Any, NamedTuple


class Begun(NamedTuple):
    """A call that has begun in another thread."""

    future: Future[Any]

    def end(self) -> Any:
        """Wait for the call, and return its result or raise what it raised."""
        return self.future.result()


class InOrder:
    """A line of calls: each one is made when those that were begun before it have returned.

    Each call has a thread of its own, so that no thread is left when all have returned.  After a
    call that raises, the others raise the same and are not made.
    """

    def __init__(self) -> None:
        self._last: Future[Any] | None = None

    def begin(self, call: Callable[[], Any]) -> Begun:
        """Begin a call, in the caller's context, which has NumPy's `errstate`."""
        before, self._last = self._last, Future()
        arguments = call, before, self._last
        # A daemon: a rank that fails does not wait for others, which may never come.
        Thread(
            target=copy_context().run, args=(_make, *arguments), name="exchange", daemon=True
        ).start()
        return Begun(self._last)


def _make(call: Callable[[], Any], before: Future[Any] | None, future: Future[Any]) -> None:
    try:
        if before is not None:
            before.result()
        result = call()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
