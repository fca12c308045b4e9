"""Compiles kernels, or takes them from the cache, and tells the user while they are compiled.

Numba's own cache is not used.  It trusts any file that it finds, refuses to run if it cannot write,
and checks only a function's own file: after a change in another file that the function uses, it
would run the old kernel.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numba
import numpy as np
from numba.core import event
from numba.core.caching import NullCache
from numba.core.ccallback import CFunc
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps
from numba.core.sigutils import normalize_signature

from lfm2kit.building.capacity import check_room
from lfm2kit.errors import Option
from lfm2kit.kernel_cache import KernelCache
from lfm2kit_cpu_simd.interrupts import remembered_interrupts

KERNELS = KernelCache("cpu_simd")
OWN = "lfm2kit_cpu_simd"  # this package; others, too, may have kernels compiled
SECONDS_BETWEEN_LINES = 10.0
# Bytes that compiling needs at the least (230 MB were measured); with less, LLVM aborts.
COMPILING = 200_000_000
ADVICE = (
    "compile them where more is allowed (lfm2kit warmup, with the same LFM2KIT_CACHE_DIR), or "
    "take ",
    Option("backend", "reference"),
)

# Numba's settings that do not change machine code.
WITHOUT_EFFECT = {"NUMBA_CACHE_DIR", "NUMBA_NUM_THREADS", "NUMBA_THREADING_LAYER"}


def kernel(*signatures: Any, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Do what `numba.njit` does with these signatures, but take kernels from the cache.

    Kernels release Python's lock, so that other threads go on, such as one that exchanges tokens.
    """

    def compiled(function: Callable[..., Any]) -> Any:
        dispatcher = numba.njit(nogil=True, **options)(function)
        dispatcher._cache = kept = Kept(function)
        for signature in signatures:
            with _turn(kept.name(signature)):
                dispatcher.compile(signature)
        dispatcher.disable_compile()
        return dispatcher

    return compiled


def c_function(signature: Any, **options: Any) -> Callable[[Callable[..., Any]], CFunc]:
    """Do what `numba.cfunc` does: make a function that is called by its address."""

    def compiled(function: Callable[..., Any]) -> CFunc:
        result = CFunc(function, normalize_signature(signature), locals={}, options=options)
        result._cache = kept = Kept(function)
        with _turn(kept.name(signature)):
            result.compile()
        return result

    return compiled


class Kept(NullCache):
    """Numba's interface to the cache, for the kernels of one function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        self._function = f"{function.__module__}.{function.__qualname__}{cells}"
        self._package = function.__module__.partition(".")[0]
        self._label = f"{function.__module__.split('.')[-1]}.{function.__name__}"

    def name(self, signature: Any) -> str:
        key = f"{fingerprint(self._package)} {self._function} {signature}"
        return f"{self._label}-{hashlib.sha256(key.encode()).hexdigest()[:32]}"

    def load_overload(self, signature: Any, target_context: Any) -> CompileResult | None:
        target_context.refresh()
        result = _rebuilt(self.name(signature), target_context)
        if result is None and (progress := PROGRESS.get()) is not None:
            progress.begin()  # Numba tells nobody that it compiles a C function
        return result

    def save_overload(self, signature: Any, result: CompileResult) -> None:
        KERNELS.write(self.name(signature), dumps(result._reduce()))


def _rebuilt(name: str, target_context: Any) -> CompileResult | None:
    """Return a kept kernel; None if there is none that can be used."""
    if (data := KERNELS.read(name)) is None:
        return None
    try:
        return CompileResult._rebuild(target_context, *pickle.loads(data))
    except Exception as error:  # of a kind that depends on what Numba keeps
        KERNELS.discard(name, f"Numba does not rebuild it: {type(error).__name__}")
        return None


class Progress(event.Listener):
    """A listener that says that kernels are missing, and how many were compiled so far.

    It prints whole lines, because a line that is overwritten would clash with the command line's
    progress bar.
    """

    def __init__(self, raise_again: Callable[[], None], *, is_quiet: bool) -> None:
        self._raise_again = raise_again
        self._say = KERNELS.say if not is_quiet else lambda sentence: None
        self._count = 0
        self._start: float | None = None
        self._said = 0.0

    def begin(self) -> None:
        """Begin to report: kernels are missing, and this process or another compiles them."""
        if self._start is None:
            check_room("compiling kernels takes at least", COMPILING, *ADVICE)
            self._start = self._said = time.perf_counter()
            self._say("compiling kernels for this CPU ...")

    def on_start(self, event: event.Event) -> None:
        self._raise_again()
        self.begin()

    def on_end(self, event: event.Event) -> None:
        self._count += 1
        if time.perf_counter() - self._said > SECONDS_BETWEEN_LINES:
            self._said = time.perf_counter()
            self._say(f"compiled {self._count} so far ...")

    def finish(self) -> None:
        if self._start is not None:
            seconds = time.perf_counter() - self._start
            kept = f", kept in {str(KERNELS.folder)!r}" if KERNELS.keeps else ""
            self._say(f"kernels are ready after {seconds:.0f} s{kept}")


PROGRESS: ContextVar[Progress | None] = ContextVar("PROGRESS", default=None)


@contextmanager
def announced(*, is_quiet: bool = False) -> Iterator[None]:
    """Print that kernels are compiled, if any are missing, and at the end how long it took."""
    with remembered_interrupts() as raise_again:
        progress = Progress(raise_again, is_quiet=is_quiet)
        token = PROGRESS.set(progress)
        try:
            with event.install_listener("numba:compile", progress):
                yield
        finally:
            PROGRESS.reset(token)
    progress.finish()


@contextmanager
def _turn(name: str) -> Iterator[None]:
    """Let one of several processes compile a missing kernel; all of them print this."""
    progress = PROGRESS.get()
    if progress is not None and not KERNELS.has(name):
        progress.begin()
    with KERNELS.turn(name):
        yield


@cache
def fingerprint(package: str = OWN) -> str:
    """Return a hash of a package's sources and this one's, the compilers and the CPU.

    It contains no path and no time, so another copy of the same sources has the same kernels.
    """
    digest = hashlib.sha256()
    for name in sorted({OWN, package}):
        folder = Path(str(sys.modules[name].__file__)).parent
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    features = sorted(f for f, there in llvm.get_host_cpu_features().items() if there)
    versions = [sys.version, np.__version__, numba.__version__, llvmlite.__version__]
    settings = [
        f"{name}={value}"
        for name, value in sorted(os.environ.items())
        if name.startswith("NUMBA_") and name not in WITHOUT_EFFECT
    ]
    svml = str(numba.config.USING_SVML)  # whether vector code calls Intel's library
    parts = [*versions, llvm.get_host_cpu_name(), *features, *settings, svml]
    digest.update("\0".join(parts).encode())
    return digest.hexdigest()
