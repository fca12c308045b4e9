"""What a picture of a page is: a title, a sentence, an SVG, and its figures as a table."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from lfm2kit.profiling.page.svg import element, rect, text

WIDTH = 900  # of all pictures
BEGIN = 60.0  # of a legend's lines


class Picture(NamedTuple):
    title: str
    about: str  # what it shows, in a sentence or two
    svg: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]

    def html(self) -> str:
        """Return a section with the picture, and its table folded away."""
        return element(
            "section",
            element("h2", escape(self.title)),
            element("p", escape(self.about)),
            element("figure", self.svg),
            element("details", element("summary", "The figures"), self._table()),
        )

    def _table(self) -> str:
        head = element("tr", *(element("th", escape(one)) for one in self.headings))
        body = [element("tr", *(element("td", escape(c) or " ") for c in row)) for row in self.rows]
        return element("div", element("table", element("thead", head), element("tbody", *body)))


def duration(seconds: float) -> str:
    """Return a time in three digits: "12.1 ms"."""
    milliseconds = 1e3 * seconds
    if milliseconds < 1:
        return f"{1e3 * milliseconds:.3g} us"
    return f"{milliseconds:.0f} ms" if milliseconds >= 100 else f"{milliseconds:.3g} ms"


def legend(colours: dict[str, str]) -> tuple[list[str], float]:
    """Return the shapes of a legend, from left to right in as many lines as need be.

    With them comes the place below.
    """
    shapes, x, y = list[str](), BEGIN, 16.0
    for name, colour in colours.items():
        width = 26 + 7.0 * len(name)
        if x + width > WIDTH:
            x, y = BEGIN, y + 18
        shapes += [rect(x, y - 9, 10, 10, fill=colour), text(x + 14, y, name)]
        x += width
    return shapes, y + 18
