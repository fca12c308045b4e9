"""The ranks: how long each of them computes, exchanges and waits in a forward."""

from __future__ import annotations

from collections.abc import Sequence

from lfm2kit.profiling.figures import totals
from lfm2kit.profiling.page import colours
from lfm2kit.profiling.page.picture import WIDTH, Picture, duration, legend
from lfm2kit.profiling.page.svg import picture, rect, text
from lfm2kit.profiling.ranks import OfRank

LEFT, ROW = 110, 22


def rank_bars(ranks: Sequence[OfRank]) -> Picture:
    """Return the picture: a bar for each rank, divided by kinds."""
    of = colours.of_kinds(part.kind for one in ranks for part in one.parts)
    longest = max(sum(part.seconds for part in one.parts) for one in ranks)
    shapes, top = legend(of)
    for i, one in enumerate(ranks):
        shapes += _bar(one, top + i * ROW, (WIDTH - LEFT - 20) / longest, of)
    return Picture(
        "Ranks",
        "The time of each rank by kind, and what it waits for the others. Packing, and adding up "
        "what comes back, is the exchange. An operation between ranks takes as long as it does on "
        "the rank that comes last; the others wait beforehand.",
        picture(WIDTH, top + ROW * len(ranks) + 4, "Time of each rank by kind", shapes),
        ("rank", "samples", "blocks, us", "exchange, us", "waits, us", "between, us"),
        [(str(one.rank), str(one.samples), *map(_microseconds, _times(one))) for one in ranks],
    )


def _bar(one: OfRank, y: float, scale: float, of: dict[str, str]) -> list[str]:
    shapes, x = [text(LEFT - 6, y + 14, f"rank {one.rank}", text_anchor="end")], float(LEFT)
    for total in totals(one.parts, None):
        tip = f"rank {one.rank}, {total.kind}: {duration(total.seconds)}"
        shapes.append(rect(x, y, total.seconds * scale, ROW - 5, tip, fill=of[total.kind]))
        x += total.seconds * scale
    return shapes


def _times(one: OfRank) -> tuple[float, ...]:
    return one.blocks, one.exchange, one.waits, max(one.between, 0.0)


def _microseconds(seconds: float) -> str:
    return f"{1e6 * seconds:.1f}"
