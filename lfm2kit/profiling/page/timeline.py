"""The time line: when each block runs in each memory, in one forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lfm2kit.profiling.marks import Span, finest
from lfm2kit.profiling.page import colours
from lfm2kit.profiling.page.picture import Picture, duration, legend
from lfm2kit.profiling.page.svg import line, picture, rect, text

WIDTH, LEFT, TRACK, TOP = 900, 110, 40, 34


def timeline(spans: Sequence[Span], kinds: Mapping[str, str]) -> Picture:
    """Return the picture: a track for each memory; `kinds` are those of blocks, by name."""
    shown = finest(spans)
    memories = list(dict.fromkeys(span.memory for span in shown))
    end = max(span.begin + span.seconds for span in shown)
    of = colours.of_kinds(kinds.get(span.name, "block") for span in shown)
    scale = (WIDTH - LEFT - 40) / end
    shapes = legend(of, 16)
    for i, memory in enumerate(memories):
        shapes.append(text(LEFT - 6, TOP + i * TRACK + 18, memory, text_anchor="end"))
    for span in shown:
        name = span.name
        y = TOP + memories.index(span.memory) * TRACK
        tip = f"{name}: {duration(span.seconds)}, from {duration(span.begin)} on"
        fill = of[kinds.get(name, "block")]
        x, width = LEFT + span.begin * scale, max(span.seconds * scale, 0.5)
        shapes.append(rect(x, y, width, TRACK - 12, tip, fill=fill))
    bottom = TOP + len(memories) * TRACK
    shapes += [line(LEFT, bottom, WIDTH - 20, bottom, class_="grid"), *_ticks(end, scale, bottom)]
    return Picture(
        "Time line",
        "One forward with marks in all blocks: what is empty between two blocks is spent outside "
        "of both, such as waiting for another memory. Each memory has its own clock, which begins "
        "with its first block.",
        picture(WIDTH, bottom + 24, "Time line of one forward", shapes),
        ("block", "memory", "from, us", "microseconds"),
        [(s.name, s.memory, f"{1e6 * s.begin:.1f}", f"{1e6 * s.seconds:.1f}") for s in shown],
    )


def _ticks(end: float, scale: float, y: float) -> list[str]:
    return [
        text(LEFT + at * scale, y + 16, duration(at), text_anchor="middle")
        for at in (0.0, 0.25 * end, 0.5 * end, 0.75 * end, end)
    ]
