"""Compares two records of one kind: what has changed, and which figures are better or worse."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

from lfm2kit.errors import Lfm2kitError
from lfm2kit.records.figures import Figure
from lfm2kit.records.noise import Interval, median_interval
from lfm2kit.records.reading import Read

HARDWARE = ("processor", "cores", "system", "devices")  # of a machine; the rest are versions
NAMES = ("figure", "block", "name", "id")  # fields that name a row of a table


class Verdict(enum.StrEnum):
    """What can be said of a figure that is in both records."""

    worse = "worse"
    better = "better"
    within = "within the noise"
    unknown = "noise unknown"  # too few repetitions
    differs = "differs"  # and has no noise
    equal = "equal"


IN_LINE = {Verdict.unknown: "of unknown noise", Verdict.differs: "different"}


class Change(NamedTuple):
    """Something that is not the same in both records; None is what one of them does not have."""

    part: str  # "machine", "options" or "fields"
    name: str
    before: Any
    after: Any


class Compared(NamedTuple):
    """A figure that is in both records."""

    before: Figure
    after: Figure

    @property
    def medians(self) -> tuple[float, float]:
        return median(self.before.values), median(self.after.values)

    @property
    def intervals(self) -> tuple[Interval | None, Interval | None]:
        return median_interval(self.before.values), median_interval(self.after.values)

    @property
    def change(self) -> float | None:
        """Return the difference of the medians as a share of the one before; None if that is 0."""
        before, after = self.medians
        return (after - before) / abs(before) if before else None

    @property
    def verdict(self) -> Verdict:
        before, after = sorted(self.before.values), sorted(self.after.values)
        if self.before.better is None:  # repeated or not
            return Verdict.equal if {*before} == {*after} else Verdict.differs
        if before == after:
            return Verdict.equal
        then, now = self.intervals
        if then is None or now is None:
            return Verdict.unknown
        if then.low <= now.high and now.low <= then.high:
            return Verdict.within
        is_better = (now.low > then.high) == (self.before.better == "higher")
        return Verdict.better if is_better else Verdict.worse


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two records, and what is to be said of them."""

    before: Read
    after: Read
    changes: Sequence[Change]
    figures: Sequence[Compared]

    @classmethod
    def of(cls, before: Read, after: Read) -> Comparison:
        """Compare two records; raise `Lfm2kitError` if they are of different kinds or versions."""
        for what in ("kind", "version"):
            one, other = getattr(before, what), getattr(after, what)
            if one != other:
                said = f"the {what} of {before.name} is {one}, and that of {after.name} is {other}"
                raise Lfm2kitError(f"{said}; give two records of one command")
        both = [
            Compared(figure, after.figures[name])
            for name, figure in before.figures.items()
            if name in after.figures and _is_same(figure, after.figures[name])
        ]
        return cls(before, after, list(_changes(before, after)), both)

    @property
    def other_hardware(self) -> list[str]:
        """Return in what the machines differ, versions apart."""
        names = (change.name for change in self.changes if change.part == "machine")
        return [name for name in names if name.partition(".")[0] in HARDWARE]

    def only_in(self, record: Read) -> list[str]:
        """Return the figures that the other record does not have."""
        both = {one.before.name for one in self.figures}
        return [name for name in record.figures if name not in both]

    def counts(self) -> dict[Verdict, int]:
        """Return how many figures there are of each verdict."""
        verdicts = [one.verdict for one in self.figures]
        return {verdict: verdicts.count(verdict) for verdict in Verdict}

    def line(self) -> str:
        """Return the verdict on all figures in words."""
        counts = {IN_LINE.get(verdict, verdict): n for verdict, n in self.counts().items()}
        said = ", ".join(f"{n} {verdict}" for verdict, n in counts.items() if n)
        if not said:
            return "no figure is in both records"
        some = "1 figure" if len(self.figures) == 1 else f"{len(self.figures)} figures"
        return f"{some} in both records: {said}"


def _is_same(one: Figure, other: Figure) -> bool:
    return (one.unit, one.better) == (other.unit, other.better)


def _changes(before: Read, after: Read) -> Iterator[Change]:
    """Yield what is not the same: of the machine, of the options, and of settings."""
    for part in ("machine", "options", "fields"):
        then, now = (dict(_settings(getattr(record, part))) for record in (before, after))
        for name in dict.fromkeys([*then, *now]):
            if then.get(name) != now.get(name):
                yield Change(part, name, then.get(name), now.get(name))


def _settings(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what can be compared as it is, by name.

    That are texts, lists of them and so on.  Numbers inside objects are results, which come again
    as figures.
    """
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{key}", item) for key, item in _words(value))
        elif _is_table(value):
            for row in value:
                key = next(key for key in NAMES if key in row)
                columns = _words({name: item for name, item in row.items() if name != key})
                yield from ((f"{row[key]}.{column}", item) for column, item in columns)
        elif value != [] and not _has_objects(value):
            yield name, value


def _words(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the texts, lists of texts, truth values and nulls of an object and of those in it."""
    for key, value in fields.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{inner}", item) for inner, item in _words(value))
        elif value is None or isinstance(value, (str, bool)) or _is_texts(value):
            yield key, value


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_table(value: Any) -> bool:
    """Return whether a value is a list of objects that have names."""
    rows = value if isinstance(value, list) else []
    return bool(rows) and all(isinstance(row, dict) and {*NAMES} & {*row} for row in rows)


def _has_objects(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)
