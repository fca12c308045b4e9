"""exp and silu in float32, written so that loops over them become vector code."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

_LOG2_E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)  # ln 2 in two parts: n * _LN2_HIGH is exact for every n
_LN2_LOW = np.float32(-2.12194440e-4)
_LEAST, _MOST = np.float32(-87.3), np.float32(88.3)  # exp of them is a normal float32


@numba.njit(inline="always")
def exp(x: Any) -> Any:
    """Return e^x, clamped to the normal float32 numbers, with a relative error of 1.2e-7.

    It is 2^n * e^r with |r| <= ln(2) / 2, and e^r is the polynomial of Cephes' expf.
    """
    x = min(max(x, _LEAST), _MOST)
    n = np.floor(x * _LOG2_E + np.float32(0.5))
    r = x - n * _LN2_HIGH
    r = r - n * _LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    e_r = p * r * r + r + np.float32(1)
    two_n = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return e_r * two_n


@numba.njit(inline="always")
def silu(x: Any) -> Any:
    """Return x / (1 + e^-x); below -88 it is not quite 0, by less than matters."""
    return x / (np.float32(1) + exp(-x))
