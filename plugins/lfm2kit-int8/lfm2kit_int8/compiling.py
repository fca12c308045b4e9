"""Compiles kernels with Numba, or takes them from lfm2kit's kernel cache.

Numba's own cache looks at the file of a function alone: after a change of another file of this
package it would run the old kernel.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
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

from lfm2kit.kernel_cache import KernelCache

KERNELS = KernelCache("int8")
# Numba's settings that do not change machine code.
WITHOUT_EFFECT = {"NUMBA_CACHE_DIR", "NUMBA_NUM_THREADS", "NUMBA_THREADING_LAYER"}


def kernel(signature: Any, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Do what `numba.njit` does with a signature; Python's lock is free while the kernel runs."""

    def compiled(function: Callable[..., Any]) -> Any:
        dispatcher = numba.njit(nogil=True, **options)(function)
        dispatcher._cache = kept = Kept(function)
        with KERNELS.turn(kept.name(signature)):
            dispatcher.compile(signature)
        dispatcher.disable_compile()
        return dispatcher

    return compiled


def c_function(signature: Any) -> Callable[[Callable[..., Any]], CFunc]:
    """Do what `numba.cfunc` does: make a function that is called by its address."""

    def compiled(function: Callable[..., Any]) -> CFunc:
        result = CFunc(function, normalize_signature(signature), locals={}, options={})
        result._cache = kept = Kept(function)
        with KERNELS.turn(kept.name(signature)):
            result.compile()
        return result

    return compiled


class Announcer(event.Listener):
    """A listener that prints a line when the first kernel is compiled."""

    def __init__(self) -> None:
        self._has_said = False

    def on_start(self, event: event.Event) -> None:
        if not self._has_said:
            KERNELS.say("compiling kernels for this CPU ...")
        self._has_said = True

    def on_end(self, event: event.Event) -> None:
        pass


def announced() -> AbstractContextManager[Any]:
    """Have a line printed if kernels are compiled meanwhile, and are not taken from the cache."""
    listening: AbstractContextManager[Any] = event.install_listener("numba:compile", Announcer())
    return listening


class Kept(NullCache):
    """Numba's interface to a cache, for the kernels of one function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        self._function = f"{function.__module__}.{function.__qualname__}{cells}"
        self._label = function.__name__

    def name(self, signature: Any) -> str:
        key = f"{fingerprint()} {self._function} {signature}"
        return f"{self._label}-{hashlib.sha256(key.encode()).hexdigest()[:32]}"

    def load_overload(self, signature: Any, target_context: Any) -> CompileResult | None:
        target_context.refresh()
        name = self.name(signature)
        if (data := KERNELS.read(name)) is None:
            return None
        try:
            return CompileResult._rebuild(target_context, *pickle.loads(data))
        except Exception as error:  # of a kind that depends on what Numba keeps
            KERNELS.discard(name, f"Numba does not rebuild it: {type(error).__name__}")
            return None

    def save_overload(self, signature: Any, result: CompileResult) -> None:
        KERNELS.write(self.name(signature), dumps(result._reduce()))


@cache
def fingerprint() -> str:
    """Return a hash of this package's sources, the compilers, their settings and the CPU."""
    sources = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    versions = [sys.version, np.__version__, numba.__version__, llvmlite.__version__]
    features = sorted(name for name, there in llvm.get_host_cpu_features().items() if there)
    names = {name for name in os.environ if name.startswith("NUMBA_")} - WITHOUT_EFFECT
    settings = [f"{name}={os.environ[name]}" for name in sorted(names)]
    parts = [*versions, llvm.get_host_cpu_name(), *features, *settings]
    digest = hashlib.sha256("\0".join(parts).encode())
    for source in sources:
        digest.update(hashlib.sha256(source).digest())
    return digest.hexdigest()
