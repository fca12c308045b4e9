"""Compiles CUDA sources to machine code, once per chip, and keeps it in the kernel cache.

A kernel's sizes are constants of its compilation (`-DHEAD_DIM=64`).  The name of a kept kernel
contains a hash of everything that it depends on: source, headers, constants, options, NVRTC's
version.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from lfm2kit.kernel_cache import KernelCache
from lfm2kit_cuda import nvrtc
from lfm2kit_cuda.constants import OF_SOURCES

KERNELS = KernelCache("cuda")

SOURCES = Path(__file__).parent
INCLUDE = SOURCES / "include"
OPTIONS = ("-std=c++17", f"-I{INCLUDE}")


def compile_source(stem: str, architecture: str, constants: dict[str, int | str]) -> bytes:
    """Return the machine code of `{stem}.cu` for an architecture, such as sm_90a.

    It comes from the cache if it is there.
    """
    name = f"{Path(stem).name}-{_key(stem, architecture, constants)}"
    with KERNELS.turn(name):
        cubin = KERNELS.read(name)
        if cubin is None:
            _announce(architecture)
            options = (*OPTIONS, *definitions(stem, constants))
            cubin = nvrtc.compile_cubin(
                _source(stem), f"{stem}.cu", (f"--gpu-architecture={architecture}", *options)
            )
            KERNELS.write(name, cubin)
    return cubin


@cache
def _announce(architecture: str) -> None:
    """Print a line, once: kernels that are compiled later belong to the same wait."""
    KERNELS.say(f"compiling kernels for {architecture} ...")


def waits_for_previous(stem: str) -> bool:
    """Return whether the kernels of `{stem}.cu` may be launched early (see dependent.cuh)."""
    return '#include "dependent.cuh"' in _source(stem)


def architecture_name(major: int, minor: int) -> str:
    """Return the architecture to compile for; Hopper's own instructions need the `a`."""
    return f"sm_{major}{minor}" + ("a" if major == 9 else "")


@cache
def _source(stem: str) -> str:
    return (SOURCES / f"{stem}.cu").read_text(encoding="utf-8")


@cache
def _headers() -> bytes:
    return b"".join(path.read_bytes() for path in sorted(INCLUDE.glob("*.cuh")))


def definitions(stem: str, constants: Mapping[str, int | str]) -> list[str]:
    """Return the compiler's options for these constants and those that `{stem}.cu` always has."""
    return [f"-D{name}={value}" for name, value in {**OF_SOURCES[stem], **constants}.items()]


def _key(stem: str, architecture: str, constants: dict[str, int | str]) -> str:
    parts = [architecture, *OPTIONS[:-1], *definitions(stem, constants), str(nvrtc.version())]
    digest = hashlib.sha256("\0".join(parts).encode())
    digest.update(_source(stem).encode() + _headers())
    return digest.hexdigest()[:24]
