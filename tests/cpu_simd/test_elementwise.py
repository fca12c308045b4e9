"""exp and silu, to the last bits of float32."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest
from lfm2kit_cpu_simd import elementwise


# Not where the module is loaded, which every worker does: to compile them takes long.
@pytest.fixture(scope="module")
def vector_exp() -> Any:
    return numba.vectorize(["float32(float32)"])(lambda x: elementwise.exp(x))


@pytest.fixture(scope="module")
def vector_silu() -> Any:
    return numba.vectorize(["float32(float32)"])(lambda x: elementwise.silu(x))


def test_exp_is_within_two_units_of_the_last_place(vector_exp: Any) -> None:
    x = np.linspace(-87, 88, 1_000_001).astype(np.float32)
    want = np.exp(x.astype(np.float64))
    assert np.max(np.abs(vector_exp(x) - want) / want) < 2.4e-7


def test_exp_of_numbers_beyond_float32_stays_finite(vector_exp: Any) -> None:
    x = np.array([-np.inf, -1e30, -200, 200, 1e30, np.inf], np.float32)
    assert np.all(np.isfinite(vector_exp(x)))


def test_silu_of_any_number_is_finite_and_right(vector_silu: Any) -> None:
    x = np.concatenate([np.linspace(-100, 100, 100_001), [-1e6, 1e6]]).astype(np.float32)
    wide = x.astype(np.float64)
    with np.errstate(over="ignore"):
        want = wide / (1 + np.exp(-wide))
    got = vector_silu(x)
    assert np.all(np.isfinite(got))
    np.testing.assert_allclose(got, want, rtol=4e-7, atol=1e-30)


def test_silu_keeps_nan_and_infinities(vector_silu: Any) -> None:
    with np.errstate(invalid="ignore"):
        got = vector_silu(np.array([np.nan, np.inf, -np.inf], np.float32))
    np.testing.assert_array_equal(got, [np.nan, np.inf, -np.inf])


def test_silu_of_zeros_and_subnormal_numbers_is_half_of_them(vector_silu: Any) -> None:
    x = np.array([0.0, -0.0, 2.0**-149, 3 * 2.0**-149, -(2.0**-140)], np.float32)
    want = x * np.float32(0.5)
    np.testing.assert_array_equal(vector_silu(x), want)
    np.testing.assert_array_equal(np.signbit(vector_silu(x)), np.signbit(want))
