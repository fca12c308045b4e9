"""A forward of a profile as Chrome's trace events, which Perfetto shows as well.

Format: "Trace Event Format", by Google; complete events ("X") with microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lfm2kit.profiling.figures import Part
from lfm2kit.profiling.forwards import Profile
from lfm2kit.profiling.marks import Span


def trace_events(profile: Profile, parts: Sequence[Part]) -> dict[str, Any]:
    """Return a document with a row of events for each memory, and one for parts of blocks there.

    The clocks of two memories begin with the first block of each.
    """
    kinds = {part.name: part.kind for part in parts}
    rows = {row: i for i, row in enumerate(sorted({_row(span) for span in profile.timeline}), 1)}
    names = [
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": i, "args": {"name": row}}
        for row, i in rows.items()
    ]
    events = [
        {
            "ph": "X",
            "name": span.name,
            "cat": kinds.get(span.name, "block"),
            "pid": 1,
            "tid": rows[_row(span)],
            "ts": 1e6 * span.begin,
            "dur": 1e6 * span.seconds,
        }
        for span in profile.timeline
    ]
    return {"traceEvents": [*names, *events], "displayTimeUnit": "ns"}


def _row(span: Span) -> str:
    return f"{span.memory}, parts" if span.part else span.memory
