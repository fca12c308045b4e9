"""The roofline: what each kind of block reaches, under the machine's measured ceilings.

Model: Williams, Waterman and Patterson, "Roofline", Communications of the ACM 52 (2009).
"""

from __future__ import annotations

from collections.abc import Sequence

from lfm2kit.backend import Ceilings
from lfm2kit.profiling.figures import Total
from lfm2kit.profiling.page import colours
from lfm2kit.profiling.page.axis import Axis
from lfm2kit.profiling.page.picture import WIDTH, Picture
from lfm2kit.profiling.page.svg import element, line, picture, text

NAME, LINE = 60, 13  # the room of a name
HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 70, 60, 26, 44


def roofline(totals: Sequence[Total], ceilings: Ceilings) -> Picture:
    """Return the picture: a dot for each kind of block that multiplies."""
    dots = [total for total in totals if total.work.flops and total.seconds]
    intensity = [one.work.flops / one.work.bytes for one in dots]
    reached = [one.work.flops / one.seconds for one in dots]
    ridge = ceilings.flops / ceilings.bytes
    x = Axis([*intensity, ridge, 2 * ridge], LEFT, WIDTH - RIGHT)
    y = Axis([*reached, ceilings.flops], HEIGHT - BOTTOM, TOP)
    of = colours.of_kinds(total.kind for total in totals)
    shapes = [*_grid(x, y), *_roof(x, y, ceilings)]
    places = [(x.at(i), y.at(f)) for i, f in zip(intensity, reached, strict=True)]
    for total, flops, at, label in zip(dots, reached, places, _labels(places), strict=True):
        tip = element("title", f"{total.kind}: {flops / 1e9:.4g} GFLOP/s")
        shapes.append(element("circle", tip, cx=at[0], cy=at[1], r=6, fill=of[total.kind]))
        shapes.append(text(*label, total.kind))
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


def _labels(dots: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the place of each dot's name beside it, below the names that are already there."""
    placed: list[tuple[float, float]] = []
    for dot_x, dot_y in dots:
        x, y = dot_x + 9, dot_y + 4
        while any(abs(x - other) < NAME and abs(y - its) < LINE for other, its in placed):
            y += 1
        placed.append((x, y))
    return placed


def _grid(x: Axis, y: Axis) -> list[str]:
    shapes = []
    for value in x.powers():
        at = x.at(value)
        shapes.append(line(at, TOP, at, HEIGHT - BOTTOM, class_="grid"))
        shapes.append(text(at, HEIGHT - BOTTOM + 16, f"{value:g}", text_anchor="middle"))
    for value in y.powers():
        at = y.at(value)
        shapes.append(line(LEFT, at, WIDTH - RIGHT, at, class_="grid"))
        shapes.append(text(LEFT - 6, at + 4, f"{value / 1e9:g}", text_anchor="end"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    shapes.append(text(middle, HEIGHT - 8, "operations per byte", text_anchor="middle"))
    return [*shapes, text(8, TOP - 8, "GFLOP/s")]


def _roof(x: Axis, y: Axis, ceilings: Ceilings) -> list[str]:
    ridge = ceilings.flops / ceilings.bytes
    first, last = 10.0**x.first, 10.0**x.last
    begin = max(first, 10.0**y.first / ceilings.bytes)
    top = y.at(ceilings.flops)
    return [
        line(x.at(begin), y.at(begin * ceilings.bytes), x.at(ridge), top, class_="roof"),
        line(x.at(ridge), top, x.at(last), top, class_="roof"),
    ]
