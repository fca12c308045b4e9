"""exp and silu in float32, written so that loops over them become vector code.

silu does the operations of cuda's silu.cuh, in their order, and has its bits.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_LOG2_E = np.float32(1.442695)
# ln 2 in two parts: n * _LN2_HIGH is exact for every n, without fused multiply-adds too.
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
# A float32 plus this is rounded to a whole number n, and its last eight bits are n + 127.
_SHIFT = np.float32(1.5 * 2**23 + 127)
_MOST = np.float32(88.3)  # e^-_MOST and e^_MOST are normal float32 numbers
_MOST_OF_SILU = np.float32(87.3)  # so is 1 / (1 + e^_MOST_OF_SILU)


@intrinsic
def fused(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a * b + c, rounded once, of three float32.

    It is rounded twice on a CPU without fused multiply-adds: see tile.py.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        float32 = ir.FloatType()
        kind = ir.FunctionType(float32, [float32] * 3)
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.fmuladd.f32")
        return builder.call(function, args)

    return types.float32(types.float32, types.float32, types.float32), codegen


@numba.njit(inline="always")
def _power(x: Any) -> Any:
    """Return e^x as two factors, of which the second is a power of two; |x| is at most 88.3.

    They are e^r with |r| <= ln(2) / 2 and 2^n.  The polynomial for e^r is within 4e-9 of it.
    """
    shifted = fused(x, _LOG2_E, _SHIFT)
    n = shifted - _SHIFT
    r = fused(-n, _LN2_HIGH, x)
    r = fused(-n, _LN2_LOW, r)
    p = fused(np.float32(0.001381454), r, np.float32(0.008368745))
    p = fused(p, r, np.float32(0.04166839))
    p = fused(p, r, np.float32(0.16666521))
    p = fused(p, r, np.float32(0.49999994))
    p = fused(p, r, np.float32(1))
    p = fused(p, r, np.float32(1))
    return p, np.int32(np.float32(shifted).view(np.int32) << np.int32(23)).view(np.float32)


@numba.njit(inline="always")
def exp(x: Any) -> Any:
    """Return e^x, clamped to the normal float32 numbers, with a relative error of 1.2e-7."""
    e_r, two_n = _power(min(max(x, -_MOST), _MOST))
    return e_r * two_n


@numba.njit(inline="always")
def silu(x: Any) -> Any:
    """Return x / (1 + e^-x); below -87.3 it is 1.2e-38 of x, which is less than matters."""
    e_r, two_n = _power(min(max(-x, -_MOST_OF_SILU), _MOST_OF_SILU))
    return x * (np.float32(1) / fused(e_r, two_n, np.float32(1)))
