"""Announces each function that Numba compiles as a step, which is progress of a watched rank."""

from __future__ import annotations

from functools import cache

from numba.core import event

from lfm2kit import progress


@cache  # once per process
def tell_compile_steps() -> None:
    event.register("numba:compile", _Steps())


class _Steps(event.Listener):
    """A listener that announces the functions being compiled; one may need another one first."""

    def __init__(self) -> None:
        self._names: list[str] = []

    def on_start(self, event: event.Event) -> None:
        self._names.append(event.data["dispatcher"].py_func.__name__)
        self._tell()

    def on_end(self, event: event.Event) -> None:
        self._names.pop()
        self._tell()

    def _tell(self) -> None:
        if self._names:
            progress.step(f"compiling {self._names[-1]}", progress.COMPILING)
        else:
            progress.step("compiled its kernels")
