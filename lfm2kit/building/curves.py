"""Times that were measured at some sizes, and what lies between these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lfm2kit.building.records import Record

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds of a call by its size, rows or bytes, as measured at some sizes.

    `sizes` ascend.  Few rows take the time in which weights are read, many rows a time in
    proportion to their number.
    """

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, size: Any) -> Float64:
        """Return the seconds at one or more sizes, fractions included.

        Linear between two measurements, and in proportion to the size after the last.  More never
        takes less time, even where a measurement says so.
        """
        rising = np.maximum.accumulate(self.seconds)
        within: Float64 = np.interp(size, self.sizes, rising)
        beyond: Float64 = np.maximum(1.0, np.asarray(size, np.float64) / self.sizes[-1])
        return within * beyond

    def document(self, sizes: str) -> dict[str, Sequence[float]]:
        """Return the fields that `read_curve` reads, where the sizes are called `sizes`."""
        return {sizes: self.sizes, "seconds": self.seconds}


def read_curve(record: Record, sizes: str, most: int) -> Curve:
    """Return the curve in a file's fields, whose sizes are called `sizes` and end at `most`."""
    curve = Curve(record.wholes(sizes, 1, most), record.rates("seconds"))
    if not curve.sizes or list(curve.sizes) != sorted(set(curve.sizes)):
        raise record.fail(sizes, "ascending numbers")
    if len(curve.seconds) != len(curve.sizes):
        raise record.fail("seconds", f"{len(curve.sizes)} numbers, as many as {sizes}")
    return curve
