"""A logarithmic axis."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor, log


class Axis:
    """An axis from one power of a base to another, which has all values between them."""

    def __init__(self, values: Sequence[float], begin: float, end: float, base: int = 10) -> None:
        self._base, self._begin, self._end = base, begin, end
        # Rounded: log(1000, 10) is a little less than 3.
        self.first = floor(round(log(min(values), base), 9))
        self.last = max(ceil(round(log(max(values), base), 9)), self.first + 1)

    def at(self, value: float) -> float:
        """Return the place of a value."""
        share = (log(value, self._base) - self.first) / (self.last - self.first)
        return self._begin + share * (self._end - self._begin)

    def powers(self) -> list[float]:
        """Return the powers of the base from one end to the other."""
        return [float(self._base) ** i for i in range(self.first, self.last + 1)]
