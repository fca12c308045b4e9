"""A contender is a process of its own: it loads one model, and then answers one question at a time.

Apart, because each engine brings its own threads; a process that waits for a question is idle.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from engines import ENGINES, Call

GIGA = 1e9
LEAST_SECONDS = 0.2  # of calls that a turn is made of: one of a millisecond would be mere chance
ASIDE = 1.5 * GIGA  # of memory: a process, its libraries and activations


@dataclass(frozen=True)
class Contender:
    """An engine on weights of one type."""

    engine: str
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.engine} {self.dtype}"

    def path(self, data: Path) -> Path:
        suffix = ".gguf" if self.engine == "llama.cpp" else ""
        return data / f"wide-6-{self.dtype}{suffix}"

    def memory(self, data: Path) -> float:
        """Return the bytes that it is likely to hold once it has loaded its model."""
        path = self.path(data)
        files = [path] if path.is_file() else path.glob("*.safetensors")
        return sum(file.stat().st_size for file in files) + ASIDE


class Answer(NamedTuple):
    seconds: float
    result: Any  # None unless it was wanted: a few MB through a pipe


class Process:
    """The near end of a contender's pipe."""

    def __init__(self, contender: Contender, data: Path, threads: int) -> None:
        self.name = contender.name
        context = multiprocessing.get_context("spawn")
        self._pipe, far = context.Pipe()
        arguments = (far, contender.engine, contender.path(data), threads)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        far.close()
        self._receive()

    def ask(self, method: str, *arguments: Any, wanted: bool = False) -> Answer:
        self._pipe.send((method, arguments, wanted))
        return Answer(*self._receive())

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            raise SystemExit(f"{self.name}: its process ended ({code}; -9: no memory?)") from None

    def stop(self) -> None:
        self._pipe.close()
        self._process.join()


@contextmanager
def running(contenders: list[Contender], data: Path, threads: int) -> Iterator[list[Process]]:
    """Yield processes that have loaded their models; refuse models that would not fit in memory."""
    needed = sum(contender.memory(data) for contender in contenders)
    available = psutil.virtual_memory().available
    if needed > available:
        names = " and ".join(contender.name for contender in contenders)
        raise SystemExit(
            f"{names} need {needed / GIGA:.1f} GB of memory, {available / GIGA:.1f} are available"
        )
    processes = [Process(contender, data, threads) for contender in contenders]
    try:
        yield processes
    finally:
        for process in processes:
            process.stop()


def _serve(pipe: Connection, engine: str, path: Path, threads: int) -> None:
    """Answer, as the process at the pipe's other end, until the pipe is closed."""
    make, *options = ENGINES[engine]
    model = make(path, threads, *options)
    pipe.send("ready")
    while True:
        try:
            method, arguments, wanted = pipe.recv()
        except EOFError:
            return
        seconds, result = _turn(getattr(model, method), arguments)
        pipe.send((seconds, result if wanted else None))


def _turn(prepare: Callable[..., Call], arguments: tuple[Any, ...]) -> Answer:
    """Return the median of as many calls as `LEAST_SECONDS` take, but at least one."""
    seconds: list[float] = []
    while sum(seconds) < LEAST_SECONDS:
        call = prepare(*arguments)
        start = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - start)
    return Answer(statistics.median(seconds), result)
