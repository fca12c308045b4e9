"""Keeps a Ctrl-C from being lost while LLVM compiles.

If a signal handler raises an exception inside a finaliser, or inside a function that C calls back,
Python prints a traceback and goes on.  While kernels are compiled, both run often.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lfm2kit.process.interrupts import SIGNALS


@contextmanager
def remembered_interrupts() -> Iterator[Callable[[], None]]:
    """Yield a function that raises again what a signal handler raised and Python dropped.

    It is called once more when the block ends, even by an error, which may come from a callback of
    LLVM's that was interrupted.
    """
    raised: list[BaseException] = []

    def raise_again() -> None:
        if raised:
            raise raised[0]

    with _handlers_noted(raised), _forgetting_is_silent(raised):
        try:
            yield raise_again
        except Exception:
            raise_again()
            raise
        raise_again()


@contextmanager
def _handlers_noted(raised: list[BaseException]) -> Iterator[None]:
    """Note what Python's signal handlers raise."""
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in SIGNALS if is_main}
    noted = {n: _noting(handler, raised) for n, handler in before.items() if callable(handler)}
    for number, handler in noted.items():
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in noted:
            signal.signal(number, before[number])


def _noting(handler: Callable[..., Any], raised: list[BaseException]) -> Callable[..., None]:
    def noting(number: int, frame: Any) -> None:
        try:
            handler(number, frame)
        except BaseException as error:
            raised.append(error)
            raise

    return noting


@contextmanager
def _forgetting_is_silent(raised: list[BaseException]) -> Iterator[None]:
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not any(unraisable.exc_value is error for error in raised):
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
