"""The layer strip: how long each layer takes, by its parts."""

from __future__ import annotations

from collections.abc import Sequence

from lfm2kit.profiling.figures import Part
from lfm2kit.profiling.page import colours
from lfm2kit.profiling.page.picture import WIDTH, Picture, duration, legend
from lfm2kit.profiling.page.svg import picture, rect, text

LEFT, ROW = 110, 18


def strip(parts: Sequence[Part]) -> Picture:
    """Return the picture: a bar for each layer, and for each block around them."""
    bars: dict[str, list[Part]] = {}
    for part in parts:
        bars.setdefault(part.name if part.layer is None else f"layer {part.layer}", []).append(part)
    longest = max(sum(part.seconds for part in bar) for bar in bars.values())
    of = colours.of_kinds(part.kind for part in parts)
    shapes, top = legend(of)
    for i, (name, bar) in enumerate(bars.items()):
        shapes += _bar(top + i * ROW, name, bar, (WIDTH - LEFT - 70) / longest, of)
    height = top + ROW * len(bars) + 6
    return Picture(
        "Layers",
        "The time of each layer by its parts, and of the blocks around the layers. Point at a part "
        "to read its time and backend.",
        picture(WIDTH, height, "Time of each layer by its parts", shapes),
        ("block", "kind", "backend", "memory", "microseconds"),
        [(p.name, p.kind, p.backend, p.memory, f"{1e6 * p.seconds:.1f}") for p in parts],
    )


def _bar(y: float, name: str, bar: Sequence[Part], scale: float, of: dict[str, str]) -> list[str]:
    shapes, x = [text(LEFT - 6, y + 11, name, text_anchor="end")], float(LEFT)
    for part in bar:
        of_what = ", ".join(filter(None, (part.kind, part.backend)))
        tip = f"{part.name} ({of_what}): {duration(part.seconds)}"
        width = part.seconds * scale
        shapes.append(rect(x, y, width, ROW - 4, tip, fill=of[part.kind], class_="bar"))
        x += width
    whole = duration(sum(part.seconds for part in bar))
    return [*shapes, text(x + 5, y + 11, whole, class_="quiet")]
