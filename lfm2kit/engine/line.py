"""A thread that makes calls one after the other, and that no process waits for at its end."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Any

_Calls = SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]


class Line:
    """A thread that begins with the first call.

    It is a daemon, because a call may never return.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: _Calls = SimpleQueue()
        self._thread: Thread | None = None

    def submit(self, call: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Return the future of a call, which is made after those before it."""
        future: Future[Any] = Future()
        self._calls.put((future, partial(call, *arguments)))
        if self._thread is None:
            self._thread = Thread(target=_make, args=(self._calls,), name=self._name, daemon=True)
            self._thread.start()
            weakref.finalize(self, self._calls.put, None)  # whoever forgets it ends it
        return future

    @property
    def is_alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def end(self) -> None:
        """End the thread after the calls that it has; no others may follow."""
        self._calls.put(None)

    def wait(self, seconds: float) -> None:
        """Wait until the thread has ended, or these seconds have passed."""
        if self._thread is not None:
            self._thread.join(seconds)


def _make(calls: _Calls) -> None:
    """Make calls until there is None instead of one."""
    while (one := calls.get()) is not None:
        future, call = one
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)
        del one, future, call  # the next one may be long in coming
