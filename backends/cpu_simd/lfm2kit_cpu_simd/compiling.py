"""Where compiled kernels are kept, and the word to the user while they are made.

Numba's own cache sees a change of a function's file, not of a generator that the function uses:
edited generators would go on running old kernels.  So the folder's name carries a hash of all of
this package's sources, of Numba's version and of the CPU with its features; a cache on a shared
home folder is never read by another kind of machine.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm
import numba


@contextmanager
def compiled_kernels() -> Iterator[None]:
    """Kernels that are imported inside are loaded from the cache, or compiled and kept there."""
    if "NUMBA_CACHE_DIR" in os.environ:
        yield
        return
    folder = _cache_folder()
    is_new = not (folder / "complete").exists()
    if is_new:
        print("cpu_simd: compiling its kernels for this CPU, once ...", file=sys.stderr, flush=True)
    start = time.perf_counter()
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(folder)
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before
    if is_new and folder.is_dir():
        (folder / "complete").touch()
        seconds = time.perf_counter() - start
        print(f"cpu_simd: compiled in {seconds:.0f} s, kept in {folder}", file=sys.stderr)


def _cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "lfm2kit" / f"cpu_simd-{_fingerprint()}"


def _fingerprint() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    features = sorted(f for f, there in llvm.get_host_cpu_features().items() if there)
    parts = [numba.__version__, llvmlite.__version__, llvm.get_host_cpu_name(), *features]
    overrides = [os.environ.get(n, "") for n in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES")]
    digest.update("\0".join([*parts, *overrides, sys.version]).encode())
    return digest.hexdigest()[:16]
