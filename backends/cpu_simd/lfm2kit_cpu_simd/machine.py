"""The vectors that kernels use: those of this CPU, or of the one that Numba is told of."""

from __future__ import annotations

import platform
from collections.abc import Iterable

import llvmlite.binding as llvm
import numba

from lfm2kit.backend import BF16, F16, F32, Format, Tensor


def _features() -> set[str]:
    """Return the CPU's features by LLVM's names, as Numba compiles for them."""
    if numba.config.CPU_FEATURES:
        named = numba.config.CPU_FEATURES.split(",")
        return {feature[1:] for feature in named if feature.startswith("+")}
    return {name for name, there in llvm.get_host_cpu_features().items() if there}


def _vector_shape() -> tuple[int, int]:
    """Return (VL, NV): float32 lanes of a vector, and vectors of a panel's row.

    Six rows of NV vectors fill three quarters of the registers: 24 of 32, or 12 of 16.
    """
    if "avx512f" in FEATURES:
        return 16, 4
    if "avx2" in FEATURES:
        return 8, 2
    return 4, 4 if IS_ARM else 2


FEATURES = _features()
IS_ARM = platform.machine() in ("aarch64", "arm64")
VL, NV = _vector_shape()
NR = NV * VL  # columns of a panel
HAS_F16C = "f16c" in FEATURES or IS_ARM  # else widening float16 would be a library call per lane
# The formats that weights are multiplied in; others are widened to F32.
STORAGES: tuple[Format, ...] = (F32, BF16, F16) if HAS_F16C else (F32, BF16)


def common_storage(tensors: Iterable[Tensor]) -> Format:
    """Return the format in which matrices are packed together: theirs, or F32.

    Float32 holds any of them exactly, if they differ or kernels do not take their format.
    """
    formats = {tensor.format for tensor in tensors}
    storage = formats.pop()
    return storage if not formats and storage in STORAGES else F32
