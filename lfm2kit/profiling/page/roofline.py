"""The roofline: what each kind of block reaches, under the machine's measured ceilings.

Model: Williams, Waterman and Patterson, "Roofline", Communications of the ACM 52 (2009).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor, log10

from lfm2kit.backend import Ceilings
from lfm2kit.profiling.figures import Total
from lfm2kit.profiling.page import colours
from lfm2kit.profiling.page.picture import WIDTH, Picture
from lfm2kit.profiling.page.svg import element, line, picture, text

HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 70, 20, 26, 44


class _Axis:
    """A logarithmic axis of whole decades."""

    def __init__(self, values: Sequence[float], begin: float, end: float) -> None:
        self.first, self.last = floor(log10(min(values))), ceil(log10(max(values)))
        self.last = max(self.last, self.first + 1)
        self._begin, self._end = begin, end

    def at(self, value: float) -> float:
        share = (log10(value) - self.first) / (self.last - self.first)
        return self._begin + share * (self._end - self._begin)

    def decades(self) -> list[float]:
        return [10.0**i for i in range(self.first, self.last + 1)]


def roofline(totals: Sequence[Total], ceilings: Ceilings) -> Picture:
    """Return the picture: a dot for each kind of block that multiplies."""
    dots = [total for total in totals if total.work.flops and total.seconds]
    intensity = [one.work.flops / one.work.bytes for one in dots]
    reached = [one.work.flops / one.seconds for one in dots]
    ridge = ceilings.flops / ceilings.bytes
    x = _Axis([*intensity, ridge, 2 * ridge], LEFT, WIDTH - RIGHT)
    y = _Axis([*reached, ceilings.flops], HEIGHT - BOTTOM, TOP)
    of = colours.of_kinds(total.kind for total in totals)
    shapes = [*_grid(x, y), *_roof(x, y, ceilings)]
    for total, flops_of_byte, flops in zip(dots, intensity, reached, strict=True):
        at = x.at(flops_of_byte), y.at(flops)
        tip = element("title", f"{total.kind}: {flops / 1e9:.4g} GFLOP/s")
        shapes.append(element("circle", tip, cx=at[0], cy=at[1], r=6, fill=of[total.kind]))
        shapes.append(text(at[0] + 9, at[1] + 4, total.kind))
    return Picture(
        "Roofline",
        "What each kind of block reaches beside the ceilings that were measured in this run: "
        f"{ceilings.flops / 1e9:.4g} GFLOP/s and {ceilings.bytes / 1e9:.4g} GB/s. Under the slope "
        "reading limits, under the flat roof computing.",
        picture(WIDTH, HEIGHT, "Roofline of the kinds of blocks", shapes),
        ("kind", "backend", "operations per byte", "GFLOP/s", "% of the roof"),
        [
            (
                one.kind,
                one.backend,
                f"{i:.4g}",
                f"{f / 1e9:.4g}",
                "-" if one.roofline is None else f"{100 * one.roofline:.3g}",
            )
            for one, i, f in zip(dots, intensity, reached, strict=True)
        ],
    )


def _grid(x: _Axis, y: _Axis) -> list[str]:
    shapes = []
    for value in x.decades():
        at = x.at(value)
        shapes.append(line(at, TOP, at, HEIGHT - BOTTOM, class_="grid"))
        shapes.append(text(at, HEIGHT - BOTTOM + 16, f"{value:g}", text_anchor="middle"))
    for value in y.decades():
        at = y.at(value)
        shapes.append(line(LEFT, at, WIDTH - RIGHT, at, class_="grid"))
        shapes.append(text(LEFT - 6, at + 4, f"{value / 1e9:g}", text_anchor="end"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    shapes.append(text(middle, HEIGHT - 8, "operations per byte", text_anchor="middle"))
    return [*shapes, text(8, TOP - 8, "GFLOP/s")]


def _roof(x: _Axis, y: _Axis, ceilings: Ceilings) -> list[str]:
    ridge = ceilings.flops / ceilings.bytes
    first, last = 10.0**x.first, 10.0**x.last
    begin = max(first, 10.0**y.first / ceilings.bytes)
    top = y.at(ceilings.flops)
    return [
        line(x.at(begin), y.at(begin * ceilings.bytes), x.at(ridge), top, class_="roof"),
        line(x.at(ridge), top, x.at(last), top, class_="roof"),
    ]
