"""How throughput grows with the ranks, as `lfm2kit bench` has measured it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lfm2kit.bounds import COUNT
from lfm2kit.building.records import read_record
from lfm2kit.errors import Lfm2kitError

VERSION = 1  # of the record
MADE_BY = "make one with lfm2kit bench, whose help says how to compare numbers of ranks"


class Point(NamedTuple):
    """A job of some ranks."""

    ranks: int
    throughput: float  # samples per second, by the median


class Curve(NamedTuple):
    """Jobs that do the same on different numbers of ranks, the fewest first."""

    name: str  # "cpu_simd: model 64x16"
    points: Sequence[Point]

    def ideal(self, point: Point) -> float:
        """Return the samples per second if each rank did as much as one of the fewest."""
        return self.points[0].throughput * point.ranks / self.points[0].ranks

    def efficiency(self, point: Point) -> float:
        """Return what share of that is reached."""
        return point.throughput / self.ideal(point)


def curves_in(path: Path, kind: str) -> list[Curve]:
    """Return the curves in a record; raise `Lfm2kitError` for a file that is not of this kind."""
    found: dict[str, dict[int, Point]] = {}
    for row in read_record(path, kind, VERSION, MADE_BY).records("results"):
        name = f"{row.text('backend')}: {row.text('test')}"
        point = Point(row.whole("ranks", 1, COUNT), row.rate("samples_per_second"))
        found.setdefault(name, {})[point.ranks] = point
    if not any(len(points) > 1 for points in found.values()):
        raise Lfm2kitError(f"{path}: it compares no numbers of ranks; {MADE_BY}")
    return [Curve(name, sorted(points.values())) for name, points in found.items()]
