"""Tells what ranks wait for each other from what they send."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lfm2kit.building.waits import RANKS
from lfm2kit.errors import Lfm2kitError
from lfm2kit.profiling.marks import WAIT, Span
from lfm2kit.transport import Transport, everyones

SENDING = "sending"
OF_RANKS = f"{WAIT}{RANKS}"


def waits_apart(forwards: Sequence[Sequence[Span]], among: Transport | None) -> list[list[Span]]:
    """Return the spans of forwards with each wait for other ranks divided in two.

    The rank that is in an operation for the shortest time has come last and waits for nobody: so
    long takes the sending itself.  What others are in it beyond that is their wait, which comes
    first.  `among` are the ranks that exchange tokens; every one of them calls this.
    """
    taken = [span.seconds for spans in forwards for span in spans if span.what.kind == OF_RANKS]
    if among is None:
        return [list(spans) for spans in forwards]
    counts = everyones(among, len(taken))
    if len(set(counts.tolist())) > 1:
        said = ", ".join(map(str, counts))
        raise Lfm2kitError(f"the exchange told {said} waits on the ranks, which must be as many")
    least = iter(everyones(among, taken).min(axis=0).tolist() if taken else ())
    return [[part for span in spans for part in _divided(span, least)] for spans in forwards]


def _divided(span: Span, least: Iterator[float]) -> Iterator[Span]:
    if span.what.kind != OF_RANKS:
        yield span
        return
    sending = min(next(least), span.seconds)
    waited = span.seconds - sending
    yield span._replace(seconds=waited, own=waited)
    what = span.what._replace(kind=SENDING)
    yield Span(what, span.memory, span.begin + waited, sending, sending)
