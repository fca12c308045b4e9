"""The scaling curve: samples per second by ranks, beside the ideal line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from itertools import pairwise

from lfm2kit.profiling.page.axis import Axis
from lfm2kit.profiling.page.colours import PALETTE
from lfm2kit.profiling.page.picture import WIDTH, Picture, legend
from lfm2kit.profiling.page.svg import element, line, picture, text
from lfm2kit.profiling.scaling import Curve

COLUMNS = ("test", "ranks", "samples/s", "ideal", "% of the ideal")
HEIGHT, LEFT, RIGHT, BOTTOM = 360, 70, 20, 44


def scaling(curves: Sequence[Curve]) -> Picture:
    """Return the picture: a line with a dot for each number of ranks, and a dashed ideal one."""
    points = [point for curve in curves for point in curve.points]
    ideals = [curve.ideal(point) for curve in curves for point in curve.points]
    of = {curve.name: PALETTE[i % len(PALETTE)] for i, curve in enumerate(curves)}
    shapes, top = legend(of)
    x = Axis([point.ranks for point in points], LEFT, WIDTH - RIGHT, base=2)
    y = Axis([*ideals, *(point.throughput for point in points)], HEIGHT - BOTTOM, top + 18)
    shapes += _grid(x, y, top + 18)
    for curve in curves:
        shapes += _curve(curve, x, y, of[curve.name])
    return Picture(
        "Scaling",
        "Samples per second of jobs of several numbers of ranks, as lfm2kit bench has measured "
        "them. On the dashed line each rank would do as much as one of the fewest.",
        picture(WIDTH, HEIGHT, "Samples per second by ranks", shapes),
        COLUMNS,
        [row for curve in curves for row in rows(curve)],
    )


def rows(curve: Curve) -> Iterator[tuple[str, ...]]:
    """Yield a row of a table for each number of ranks."""
    for point in curve.points:
        numbers = point.throughput, curve.ideal(point), 100 * curve.efficiency(point)
        yield curve.name, str(point.ranks), *(f"{number:.4g}" for number in numbers)


def _grid(x: Axis, y: Axis, top: float) -> Iterator[str]:
    for ranks in x.powers():
        at = x.at(ranks)
        yield line(at, top, at, HEIGHT - BOTTOM, class_="grid")
        yield text(at, HEIGHT - BOTTOM + 16, f"{ranks:g}", text_anchor="middle")
    for throughput in y.powers():
        at = y.at(throughput)
        yield line(LEFT, at, WIDTH - RIGHT, at, class_="grid")
        yield text(LEFT - 6, at + 4, f"{throughput:g}", text_anchor="end")
    yield text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "ranks", text_anchor="middle")
    yield text(8, top - 14, "samples/s")


def _curve(curve: Curve, x: Axis, y: Axis, colour: str) -> Iterator[str]:
    first, last = curve.points[0], curve.points[-1]
    begin = x.at(first.ranks), y.at(first.throughput)
    yield line(*begin, x.at(last.ranks), y.at(curve.ideal(last)), class_="ideal")
    places = [(x.at(point.ranks), y.at(point.throughput)) for point in curve.points]
    for start, stop in pairwise(places):
        yield line(*start, *stop, stroke=colour, stroke_width=2)
    for place, point in zip(places, curve.points, strict=True):
        said = f"{curve.name} on {point.ranks}: {point.throughput:.4g} samples/s"
        tip = element("title", escape(f"{said}, {curve.efficiency(point):.0%} of the ideal"))
        yield element("circle", tip, cx=place[0], cy=place[1], r=5, fill=colour)
