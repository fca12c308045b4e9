"""Compares what a block returned with what it should have: exactly, or within the tolerance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from lfm2kit.testing.verdicts import CheckFailed

HostArray = npt.NDArray[Any]
Result = HostArray | tuple[HostArray, ...]


def assert_close(
    got: Result,
    want: Result,
    within: float,
    what: str,
    rows: Any = slice(None),
    usual: Callable[[], Result] | None = None,
) -> None:
    """Raise `CheckFailed` unless `got` is finite and within `within * max|want|` of `want`.

    The arrays of a tuple are compared one by one; integers must be equal.  Of each array only
    `rows` are compared.  A few values may all be near 0 by chance: if they are not close, `usual`
    gives another result of the block, and what is allowed depends on its largest value, if that is
    larger.
    """
    for i, (name, *whole) in enumerate(_pairs(got, want, what)):
        array, expected = (one[rows] for one in whole)
        limit = _limit(within, expected)
        with np.errstate(invalid="ignore"):
            error = np.abs(array.astype(np.float64) - expected)
        if usual is not None and not np.all(error <= limit):
            limit = max(limit, _limit(within, each(usual())[i]))
        if not np.all(error <= limit):  # false for NaN as well
            raise CheckFailed(
                f"{name}: {_worst(error, array, expected, rows)}; allowed is {limit:.2g}, "
                f"{np.sum(~(error <= limit))} of {error.size} values are off"
            )


def _limit(within: float, values: HostArray) -> float:
    if np.issubdtype(values.dtype, np.integer):
        return 0.0
    return within * float(np.max(np.abs(values), initial=1e-6))


def assert_same(got: Result, want: Result, what: str) -> None:
    """Raise `CheckFailed` unless `got` has the type and the bits of `want`.

    So -0 is not 0.  One NaN is as good as another: a processor may choose its bits.
    """
    for name, array, expected in _pairs(got, want, what):
        if array.dtype != expected.dtype:
            raise CheckFailed(f"{name}: {array.dtype}, expected {expected.dtype}")
        differ = _bits(array) != _bits(expected)
        if differ.any():
            with np.errstate(invalid="ignore"):
                error = np.abs(array.astype(np.float64) - expected)
            worst = _worst(np.where(differ, error, -1.0), array, expected)
            raise CheckFailed(
                f"{name}: not the same bits: {worst}, "
                f"{np.sum(differ)} of {differ.size} values differ"
            )


def each(result: Result) -> tuple[HostArray, ...]:
    """Return the arrays of a block's result, which may be one array or a tuple."""
    return result if isinstance(result, tuple) else (result,)


def rows_of(result: Result, rows: Any) -> Result:
    """Return some rows of every array of a result."""
    return tuple(array[rows] for array in result) if isinstance(result, tuple) else result[rows]


def _pairs(got: Result, want: Result, what: str) -> Iterator[tuple[str, HostArray, HostArray]]:
    arrays, expected = each(got), each(want)
    if len(arrays) != len(expected):
        raise CheckFailed(f"{what}: returned {len(arrays)} arrays, expected {len(expected)}")
    names = [what] if len(expected) == 1 else [f"{what}, result {i}" for i in range(len(expected))]
    for name, one, other in zip(names, arrays, expected, strict=True):
        if one.shape != other.shape:
            raise CheckFailed(f"{name}: shape {one.shape}, expected {other.shape}")
        yield name, one, other


def _bits(array: HostArray) -> npt.NDArray[np.unsignedinteger[Any]]:
    """Return the bits of each value as a whole number, those of each NaN as the same one."""
    array = np.array(array, order="C")
    if array.dtype.kind == "f":
        array[np.isnan(array)] = np.nan
    bits: npt.NDArray[np.unsignedinteger[Any]] = array.view(f"u{array.itemsize}")
    return bits


def _worst(
    error: npt.NDArray[np.float64], got: HostArray, want: HostArray, rows: Any = slice(None)
) -> str:
    """Return the largest error (the first NaN, if there is one) and where it is.

    What is compared are `rows` of larger arrays, and the place is one in these.
    """
    where = np.unravel_index(int(np.argmax(error)), error.shape)
    first = where[:1] if isinstance(rows, slice) else (rows[where[0]],)
    at = ", ".join(str(int(i)) for i in (*first, *where[1:]))
    return (
        f"max abs error {error[where]:.3g} at [{at}]: got {got[where]:.8g}, want {want[where]:.8g}"
    )
