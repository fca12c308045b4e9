"""SVG as text: elements with their attributes, whose values and texts are escaped."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape


def element(name: str, *children: str, **attributes: object) -> str:
    """Return an element; `class_` and `text_anchor` are written as class and text-anchor."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_text(value))}"'
        for key, value in attributes.items()
    )
    return f"<{name}{given}>{''.join(children)}</{name}>" if children else f"<{name}{given}/>"


def text(x: float, y: float, words: str, **attributes: object) -> str:
    return element("text", escape(words), x=x, y=y, **attributes)


def rect(
    x: float, y: float, width: float, height: float, tip: str = "", **attributes: object
) -> str:
    """Return a rectangle that shows `tip` when it is pointed at."""
    tips = [element("title", escape(tip))] if tip else []
    return element("rect", *tips, x=x, y=y, width=max(width, 0), height=height, **attributes)


def line(x1: float, y1: float, x2: float, y2: float, **attributes: object) -> str:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, **attributes)


def picture(width: float, height: float, about: str, shapes: Iterable[str]) -> str:
    """Return an SVG that fits the width of its surroundings; `about` is what is read aloud."""
    return element(
        "svg",
        *shapes,
        viewBox=f"0 0 {_text(width)} {_text(height)}",
        role="img",
        aria_label=about,
    )


def _text(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
