"""The error ladder: how far each block is from the reference, alone and after all before it."""

from __future__ import annotations

from math import isfinite, log10

from lfm2kit.profiling.page.picture import WIDTH, Picture
from lfm2kit.profiling.page.svg import element, line, picture, rect, text
from lfm2kit.verifying.verification import Verification

LEFT, RIGHT, ROW, TOP = 190, 20, 14, 34
LEAST, MOST = 1e-9, 1.0


def ladder(found: Verification) -> Picture:
    """Return the picture: a row for each block, with its own error, its drift and its limit."""
    worst = list(found.worst_calls())
    shapes = [text(LEFT, 14, "bar: its own error; ring: drift; stroke: what is allowed")]
    for i in range(10):
        x = _at(10.0 ** (i - 9))
        shapes.append(line(x, TOP - 8, x, TOP + ROW * len(worst), class_="grid"))
        shapes.append(text(x, TOP - 10, f"1e{i - 9}", text_anchor="middle", class_="quiet"))
    for i, one in enumerate(worst):
        y, limit = TOP + i * ROW, _at(one.allowed)
        shapes.append(text(LEFT - 6, y + 10, one.block, text_anchor="end", class_="small"))
        tip = f"{one.block}: {one.error:.1e} of {one.allowed:.0e}"
        shape = "within" if one.is_within else "beyond"
        shapes.append(rect(LEFT, y + 3, _at(one.error) - LEFT, ROW - 6, tip, class_=shape))
        shapes.append(line(limit, y + 1, limit, y + ROW - 1, class_="roof"))
        if (drift := found.drift.get(one.block)) is not None:
            shapes.append(element("circle", cx=_at(drift), cy=y + ROW / 2, r=3, class_="ring"))
    return Picture(
        "Errors",
        "Each block's largest error beside the reference's, with the reference's arguments, and "
        "its drift: the error when the model runs by itself.",
        picture(WIDTH, TOP + ROW * len(worst) + 6, "Errors of each block", shapes),
        ("block", "kind", "own error", "allowed", "drift"),
        [
            (one.block, one.kind, f"{one.error:.1e}", f"{one.allowed:.0e}",
             f"{found.drift.get(one.block, 0.0):.1e}")
            for one in worst
        ],
    )  # fmt: skip


def _at(error: float) -> float:
    """Return the place of an error on the axis, which is logarithmic."""
    inside = min(max(error, LEAST), MOST) if isfinite(error) else MOST
    return LEFT + (log10(inside) - log10(LEAST)) / 9 * (WIDTH - LEFT - RIGHT)
