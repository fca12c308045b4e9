"""Bars: one number for each of some names, and a table that says more."""

from __future__ import annotations

from collections.abc import Sequence

from lfm2kit.profiling.page.picture import WIDTH, Picture
from lfm2kit.profiling.page.svg import picture, rect, text

LEFT, ROW = 240, 20


def bars(
    title: str,
    about: str,
    numbers: Sequence[tuple[str, float]],
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
) -> Picture:
    """Return a picture with a bar for each number, and the table below."""
    most = max((number for _, number in numbers), default=1.0) or 1.0
    shapes = []
    for i, (name, number) in enumerate(numbers):
        y, width = i * ROW, (WIDTH - LEFT - 90) * number / most
        shapes.append(text(LEFT - 6, y + 13, name, text_anchor="end"))
        said = f"{number:,.0f}" if number >= 1000 else f"{number:.4g}"
        shapes.append(rect(LEFT, y + 2, width, ROW - 6, f"{name}: {said}", class_="within"))
        shapes.append(text(LEFT + width + 5, y + 13, said, class_="quiet"))
    svg = picture(WIDTH, ROW * len(numbers) + 4, title, shapes)
    return Picture(title, about, svg, headings, rows)
