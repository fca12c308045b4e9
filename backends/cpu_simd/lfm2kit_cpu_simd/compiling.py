"""Where compiled kernels are kept, and the word to the user while they are made.

Numba's own cache sees a change of a function's file, not of a generator that the function uses:
edited generators would go on running old kernels.  So the folder's name carries a hash of all of
this package's sources, of Numba's version and of the CPU with its features; a cache on a shared
home folder is never read by another kind of machine.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm
import numba
from numba.core import event


@contextmanager
def compiled_kernels() -> Iterator[None]:
    """Kernels that are imported inside are loaded from the cache, or compiled and kept there."""
    if "NUMBA_CACHE_DIR" in os.environ:
        yield
        return
    folder = _cache_folder()
    is_new = not (folder / "complete").exists()
    with _kept_in(folder), _announced(folder) if is_new else nullcontext():
        yield
    if is_new:
        (folder / "complete").touch()


@contextmanager
def _kept_in(folder: Path) -> Iterator[None]:
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(folder)
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before


@contextmanager
def _announced(folder: Path) -> Iterator[None]:
    """Says that kernels are compiled, on a terminal how many, and how long it took."""
    _say("cpu_simd: compiling its kernels for this CPU, once ...")
    progress = Progress()
    start = time.perf_counter()
    with event.install_listener("numba:compile", progress):
        yield
    progress.clear()
    seconds = time.perf_counter() - start
    _say(f"cpu_simd: compiled {progress.count} in {seconds:.0f} s, kept in {folder}")


class Progress(event.Listener):
    """Counts the compiled functions, on one line that is written over and over."""

    def __init__(self) -> None:
        self.count = 0
        self._shows = sys.stderr.isatty()

    def on_start(self, event: event.Event) -> None:
        pass

    def on_end(self, event: event.Event) -> None:
        self.count += 1
        if self._shows:
            sys.stderr.write(f"\r\x1b[K  {self.count} kernels")
            sys.stderr.flush()

    def clear(self) -> None:
        if self._shows:
            sys.stderr.write("\r\x1b[K")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _cache_folder() -> Path:
    """A folder that can be written: of the user, or else of this process.

    Numba would otherwise keep kernels beside the sources, where they may be stale.
    """
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(home) / "lfm2kit" / f"cpu_simd-{fingerprint()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK) or (folder / "complete").exists():
            return folder
    except OSError:
        pass
    temporary = Path(tempfile.mkdtemp(prefix="lfm2kit-"))
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    _say(f"cpu_simd: {folder} cannot be written, so that kernels are compiled for this run only")
    return temporary


def fingerprint() -> str:
    """Changes with this package's sources, the compilers and the CPU that they compile for."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    features = sorted(f for f, there in llvm.get_host_cpu_features().items() if there)
    parts = [numba.__version__, llvmlite.__version__, llvm.get_host_cpu_name(), *features]
    overrides = [os.environ.get(n, "") for n in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES")]
    digest.update("\0".join([*parts, *overrides, sys.version]).encode())
    return digest.hexdigest()[:16]
