"""NVRTC, NVIDIA's run-time compiler: CUDA C++ to machine code.  It needs no GPU and no driver.

Its own binding, not CuPy's: CuPy appends `-ftz=true` to every compilation, which flushes small
numbers to zero, and kernels are to be compiled where there is no CuPy too.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from lfm2kit import progress
from lfm2kit.errors import Lfm2kitError

VERSIONS = (13, 12)
SUCCESS, INVALID_OPTION, COMPILATION_ERROR = 0, 5, 6


class CompileError(Exception):
    """A source that the compiler rejects; the message is the compiler's log."""


def why_unavailable() -> str | None:
    """Return what to do about a missing NVRTC; None if there is one."""
    try:
        _library()
    except Lfm2kitError as error:
        return str(error)
    return None


@cache
def version() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
    return major.value, minor.value


def compile_cubin(source: str, name: str, options: Sequence[str]) -> bytes:
    """Return the machine code of `source`.  Raise CompileError with the log if it has errors."""
    progress.step(f"compiling {name}", progress.COMPILING)
    library, program = _library(), ctypes.c_void_p()
    _check(
        library.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), name.encode(), 0, None, None
        ),
        "nvrtcCreateProgram",
    )
    try:
        arguments = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
        status = library.nvrtcCompileProgram(program, len(options), arguments)
        progress.step(f"compiled {name}")
        if status in (INVALID_OPTION, COMPILATION_ERROR):
            log = _output(program, "ProgramLog").rstrip(b"\0").decode().strip()
            raise CompileError(log) if status == COMPILATION_ERROR else _unknown_option(log)
        _check(status, "nvrtcCompileProgram")
        return _output(program, "CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _unknown_option(log: str) -> Lfm2kitError:
    """Return the error for an option: most likely the GPU is newer than the compiler."""
    return Lfm2kitError(
        f"NVRTC {'.'.join(map(str, version()))}: {log}; "
        "a newer one may know this GPU: pip install -U nvidia-cuda-nvrtc"
    )


def _output(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(getattr(_library(), f"nvrtcGet{what}Size")(program, ctypes.byref(size)), what)
    text = ctypes.create_string_buffer(size.value)
    _check(getattr(_library(), f"nvrtcGet{what}")(program, text), what)
    return text.raw


def _check(status: int, what: str) -> None:
    if status != SUCCESS:
        message = _library().nvrtcGetErrorString(status).decode()
        raise Lfm2kitError(f"NVRTC: {what}: {message}")


@cache
def _library() -> ctypes.CDLL:
    for candidate in _candidates():
        try:
            for builtins in Path(candidate).parent.glob("libnvrtc-builtins.so*"):
                ctypes.CDLL(str(builtins))  # NVRTC looks for it by name, not beside itself
            library = ctypes.CDLL(candidate)
        except OSError:
            continue
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        return library
    raise Lfm2kitError("there is no NVRTC, CUDA's run-time compiler; pip install nvidia-cuda-nvrtc")


def _candidates() -> Iterator[str]:
    """Yield paths of the library, the newest version first.

    Of each version the wheel's comes first, then the CUDA installation's, then the loader's own.
    """
    nvidia = find_spec("nvidia")
    wheels = [Path(p) for p in nvidia.submodule_search_locations or ()] if nvidia else []
    roots = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    for major in VERSIONS:
        name = f"libnvrtc.so.{major}"
        for wheel in wheels:
            yield from (str(path) for path in sorted(wheel.glob(f"*/lib/{name}")))
        yield from (str(Path(root) / "lib64" / name) for root in roots if root)
        yield name
