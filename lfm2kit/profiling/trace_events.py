"""A forward of a profile as Chrome's trace events, which Perfetto shows as well.

Format: "Trace Event Format", by Google; complete events ("X") with microseconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lfm2kit.profiling.marks import Span
from lfm2kit.profiling.ranks import OfRank


def trace_events(ranks: Sequence[OfRank]) -> dict[str, Any]:
    """Return a document with a process for each rank, and rows of events in it.

    There is a row for each memory, one for parts of blocks there, and one for waits and exchanges.
    """
    events = [event for one in ranks for event in _events(one)]
    return {"traceEvents": events, "displayTimeUnit": "ns"}


def _events(one: OfRank) -> Iterator[dict[str, Any]]:
    kinds = one.kinds()
    rows = {row: i for i, row in enumerate(sorted({_row(span) for span in one.spans}), 1)}
    yield _name("process_name", f"rank {one.rank}", one.rank, 0)
    yield from (_name("thread_name", row, one.rank, i) for row, i in rows.items())
    for span in one.spans:
        yield {
            "ph": "X",
            "name": span.name,
            "cat": kinds[span],
            "pid": one.rank + 1,
            "tid": rows[_row(span)],
            "ts": 1e6 * span.begin,
            "dur": 1e6 * span.seconds,
        }


def _name(what: str, name: str, rank: int, row: int) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": rank + 1, "tid": row, "args": {"name": name}}


def _row(span: Span) -> str:
    if span.what.kind:
        return f"{span.memory}, waits and exchanges"
    return f"{span.memory}, parts" if span.what.part else span.memory
