"""The figures of a record: what was measured or counted, with a value for each repetition."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isfinite
from typing import Any, Literal, NamedTuple

from lfm2kit.errors import Lfm2kitError, choices

Better = Literal["higher", "lower"] | None  # None: a count or a prediction, without any noise


class Figure(NamedTuple):
    """A quantity of a record; its name is unique there."""

    name: str
    unit: str  # "s", "B", "samples/s", ...
    better: Better
    values: tuple[float, ...]  # one for each repetition

    @classmethod
    def of(
        cls, name: str, unit: str, values: Iterable[float | None], better: Better = None
    ) -> Figure:
        """Return the figure of these values; those that are None, NaN or infinite are left out."""
        there = tuple(value for value in values if value is not None and isfinite(value))
        return cls(name, unit, better, there)

    def document(self) -> dict[str, Any]:
        """Return the fields of the figure in a record."""
        return {**self._asdict(), "values": list(self.values)}


def values(record: Mapping[str, Any], name: str) -> list[float]:
    """Return the values of a record's figure; raise `Lfm2kitError` if it has none of that name."""
    there = {figure["name"]: figure["values"] for figure in record["figures"]}
    if name not in there:
        raise Lfm2kitError(f"{record['kind']}: there is no figure '{name}'; {choices(name, there)}")
    return list(there[name])
