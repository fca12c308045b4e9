"""Slow twins of what cuda and cpu_simd compute with the same bits, one operation at a time."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from lfm2kit_cpu_simd.machine import FEATURES, IS_ARM
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

Float32 = npt.NDArray[np.float32]

HAS_FMA = "fma" in FEATURES or IS_ARM  # without it cpu_simd has other bits


@intrinsic
def _fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType()] * 3)
        return builder.call(
            cgutils.get_or_insert_function(builder.module, kind, "llvm.fma.f32"), args
        )

    return types.float32(types.float32, types.float32, types.float32), codegen


@numba.njit
def _sums_of_chains(x: Any, weight: Any, bounds: Any) -> Any:
    out = np.empty((x.shape[0], weight.shape[0]), np.float32)
    for row in range(x.shape[0]):
        for column in range(weight.shape[0]):
            total = np.float32(0)
            for i in range(bounds.shape[0] - 1):
                chain = np.float32(0)
                for k in range(bounds[i], bounds[i + 1]):
                    chain = _fma(x[row, k], weight[column, k], chain)
                total += chain
            out[row, column] = total
    return out


def product(x: Float32, weight: Float32, bounds: list[int]) -> Float32:
    """Return x [rows, k] @ weight [columns, k].T, by chains over the k between two bounds."""
    return np.asarray(_sums_of_chains(x, weight, np.array(bounds)))


def assert_same_bits(got: Float32, want: Float32) -> None:
    """Fail unless the bits are the same, signs of zeros included; any NaN is as good as another."""
    assert got.shape == want.shape
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.signbit(got[got == 0]), np.signbit(want[want == 0]))
