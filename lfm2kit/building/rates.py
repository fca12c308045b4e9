"""How fast a machine computes experts and moves them: what the choice of their places rests on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds of one expert's product by its number of rows, as measured at some numbers.

    `rows` ascend.  Few rows take the time in which the weights are read, many rows a time in
    proportion to their number.
    """

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, rows: Any) -> Float64:
        """Returns the seconds at one or more numbers of rows, fractions included.

        Linear between two measurements, and in proportion to the rows after the last.  More rows
        never take less time, even where a measurement says so.
        """
        rising = np.maximum.accumulate(self.seconds)
        within: Float64 = np.interp(rows, self.rows, rising)
        beyond: Float64 = np.maximum(1.0, np.asarray(rows, np.float64) / self.rows[-1])
        return within * beyond


@dataclass(frozen=True, slots=True)
class Rates:
    """What it takes to compute experts of one size on the host, and on the device or over the link.

    The device is wherever the model's memory is; the link leads there from the host's memory.
    """

    expert_bytes: int  # of an expert in the device's memory, and on the link
    host: Curve
    device: Curve
    link: float  # bytes per second to the device
