"""Compiles kernels for the CPU, where CUDA threads take turns (emulated/device.h)."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest
from lfm2kit_cuda.compiling import INCLUDE, SOURCES

COMPILER = shutil.which("g++")
USES_CPP20 = b"#include <atomic>\nint x; std::atomic_ref<int> one(x);"


def sources_in(folder: Path) -> Path:
    """Return a folder of the kernels' headers, of which some are replaced by those for the CPU.

    Skip the test if g++ is missing or does not know C++20.
    """
    if COMPILER is None or not _has_cpp20():
        pytest.skip("there is no g++ with C++20 to compile kernels for the CPU with")
    sources = shutil.copytree(INCLUDE, folder / "sources")
    return shutil.copytree(Path(__file__).parent / "emulated", sources, dirs_exist_ok=True)


def compiled_program(
    sources: Path, name: str, definitions: Iterable[str], program: Path | None = None
) -> Path:
    """Compile `emulated/{name}.cpp`, which includes a kernel's source; return the program."""
    program = program or sources.parent / name
    subprocess.run(
        [str(COMPILER), "-std=c++20", "-O1", "-pthread", f"-I{sources}", f"-I{SOURCES}",
         *dict.fromkeys(definitions), str(sources / f"{name}.cpp"), "-o", str(program)], check=True,
    )  # fmt: skip
    return program


@cache
def _has_cpp20() -> bool:
    command = [str(COMPILER), "-std=c++20", "-fsyntax-only", "-xc++", "-"]
    done = subprocess.run(command, input=USES_CPP20, stderr=subprocess.PIPE)
    return done.returncode == 0
