"""The time line: when each block runs in each memory of each rank, in one forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lfm2kit.profiling.marks import Span, finest
from lfm2kit.profiling.page import colours
from lfm2kit.profiling.page.picture import WIDTH, Picture, duration, legend
from lfm2kit.profiling.page.svg import line, picture, rect, text
from lfm2kit.profiling.ranks import OfRank

LEFT, TRACK = 110, 30
MOST_RANKS = 16  # that are drawn


class _Track(NamedTuple):
    """What one memory of one rank does."""

    name: str
    spans: Sequence[tuple[Span, str]]  # each with its kind


def timeline(ranks: Sequence[OfRank]) -> Picture:
    """Return the picture: a track for each memory of each rank, up to MOST_RANKS ranks."""
    tracks = [track for one in ranks[:MOST_RANKS] for track in _tracks(one, len(ranks))]
    end = max(span.begin + span.seconds for track in tracks for span, _ in track.spans)
    of = colours.of_kinds(kind for track in tracks for _, kind in track.spans)
    scale = (WIDTH - LEFT - 40) / end
    shapes, top = legend(of)
    for i, track in enumerate(tracks):
        y = top + i * TRACK
        shapes.append(text(LEFT - 6, y + 15, track.name, text_anchor="end"))
        # What lies within a span is drawn over it.
        for span, kind in sorted(track.spans, key=lambda shown: -shown[0].seconds):
            shapes.append(_bar(span, kind, y, scale, of[kind]))
    bottom = top + len(tracks) * TRACK
    shapes += [line(LEFT, bottom, WIDTH - 20, bottom, class_="grid"), *_ticks(end, scale, bottom)]
    return Picture(
        "Time line",
        f"One forward with marks in all blocks. {_clocks(ranks)}What is empty between two blocks "
        "belongs to neither, such as Python on the host. In the memory of a device, time counts "
        "from a mark that the idle device reaches as the forward begins.",
        picture(WIDTH, bottom + 24, "Time line of one forward", shapes),
        ("block", "of", "kind", "from, us", "microseconds"),
        [
            (s.name, track.name, kind, f"{1e6 * s.begin:.1f}", f"{1e6 * s.seconds:.1f}")
            for track in tracks
            for s, kind in track.spans
        ],
    )


def _tracks(one: OfRank, ranks: int) -> list[_Track]:
    shown, kinds = finest(one.spans), one.kinds()
    rank = f"rank {one.rank}, " if ranks > 1 else ""
    return [
        _Track(f"{rank}{memory}", [(span, kinds[span]) for span in shown if span.memory == memory])
        for memory in dict.fromkeys(span.memory for span in shown)
    ]


def _bar(span: Span, kind: str, y: float, scale: float, fill: str) -> str:
    tip = f"{span.name} ({kind}): {duration(span.seconds)}, from {duration(span.begin)} on"
    x, width = LEFT + span.begin * scale, max(span.seconds * scale, 0.5)
    return rect(x, y, width, TRACK - 8, tip, fill=fill)


def _clocks(ranks: Sequence[OfRank]) -> str:
    """Say how the ranks' clocks were compared."""
    if len(ranks) == 1:
        return ""
    only = f" The first {MOST_RANKS} ranks are drawn." if len(ranks) > MOST_RANKS else ""
    error = max(one.ahead.error for one in ranks)
    if not error:
        return f"All ranks have the clock of one machine.{only} "
    return (
        "The machines' clocks were compared by barriers, and may be wrong by "
        f"{duration(error)}.{only} "
    )


def _ticks(end: float, scale: float, y: float) -> list[str]:
    return [
        text(LEFT + at * scale, y + 16, duration(at), text_anchor="middle")
        for at in (0.0, 0.25 * end, 0.5 * end, 0.75 * end, end)
    ]
