"""Comparisons of results: equal bits, or values within a tolerance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lfm2kit.testing.compare import assert_close, assert_same
from lfm2kit.testing.verdicts import CheckFailed

NAN = float("nan")


def floats(*values: float) -> Any:
    return np.array(values, np.float32)


def other_nan() -> Any:
    return np.array([0xFFC00001], np.uint32).view(np.float32)


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (floats(1, -0.0, NAN, np.inf), floats(1, -0.0, NAN, np.inf)),
        (other_nan(), floats(NAN)),
        (floats(), floats()),
        (np.array([3, -1], np.int32), np.array([3, -1], np.int32)),
        (np.zeros((4, 6), np.float32)[:, ::2], np.zeros((4, 3), np.float32)),
        (np.full(3, 7, np.uint16), np.full(3, 7, np.uint16)),
        ((floats(1), floats(2)), (floats(1), floats(2))),
    ],
)
def test_equal_bits_are_the_same(got: Any, want: Any) -> None:
    assert_same(got, want, "x")


@pytest.mark.parametrize(
    ("got", "want", "says"),
    [
        (
            floats(1, 0.0, -0.0),
            floats(1, -0.0, -0.0),
            r"x: not the same bits: max abs error 0 at \[1\]: got 0, want -0, 1 of 3 values differ",
        ),
        (floats(1, NAN), floats(1, 2), r"error nan at \[1\]: got nan, want 2, 1 of 2 values"),
        (floats(np.inf, 1), floats(np.inf, 3), r"error 2 at \[1\]: got 1, want 3, 1 of 2 values"),
        (floats(np.inf), floats(-np.inf), "error inf"),
        (floats(1), floats(np.nextafter(np.float32(1), np.float32(2))), "1 of 1 values differ"),
        (np.array([1.0]), floats(1), "x: float64, expected float32"),
        (np.array([3], np.int64), np.array([3], np.int32), "x: int64, expected int32"),
        (floats(1, 2), floats(1), r"x: shape \(2,\), expected \(1,\)"),
        ((floats(1),), (floats(1), floats(2)), "x: returned 1 arrays, expected 2"),
        ((floats(1), floats(0)), (floats(1), floats(-0.0)), "x, result 1: not the same bits"),
    ],
)
def test_other_bits_are_not_the_same(got: Any, want: Any, says: str) -> None:
    with pytest.raises(CheckFailed, match=says):
        assert_same(got, want, "x")


def test_arguments_are_compared_as_they_are() -> None:
    got = other_nan()
    before = got.tobytes()
    assert_same(got, floats(NAN), "x")
    assert got.tobytes() == before


def test_values_that_are_close_may_differ_in_bits() -> None:
    assert_close(floats(1, 0.0), floats(1.0000001, -0.0), 1e-6, "x")
    with pytest.raises(CheckFailed, match="max abs error nan"):
        assert_close(floats(NAN), floats(1), 1e-6, "x")
