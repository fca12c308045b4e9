"""What each rank of a job has measured, brought together on rank 0."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from lfm2kit.backend import HOST, Ceilings
from lfm2kit.profiling.clocks import Ahead
from lfm2kit.profiling.figures import Part
from lfm2kit.profiling.forwards import Profile
from lfm2kit.profiling.marks import WAIT, Span, What
from lfm2kit.profiling.sending import OF_RANKS
from lfm2kit.ranks.agreement import on_first
from lfm2kit.specs import Work
from lfm2kit.transport import Transport

ENDING = What("end", kind=OF_RANKS)


class OfRank(NamedTuple):
    """The profile of one rank; its spans begin when the first rank's forward does."""

    rank: int
    machine: int
    samples: int
    seconds: float  # of a forward, until the last rank has ended: the median
    parts: Sequence[Part]
    spans: Sequence[Span]  # of one forward
    ahead: Ahead  # how far its clock is ahead of rank 0's
    ceilings: Ceilings | None

    @property
    def blocks(self) -> float:
        """Return the seconds of blocks, which overlap where memories work side by side."""
        return sum(part.seconds for part in self.parts if part.backend)

    @property
    def exchange(self) -> float:
        """Return the seconds of packing, sending and adding up what travels between ranks."""
        return self._of_core - self.waits

    @property
    def waits(self) -> float:
        """Return the seconds of waiting for other ranks and for other memories."""
        return sum(part.seconds for part in self.parts if part.kind.startswith(WAIT))

    @property
    def between(self) -> float:
        """Return the seconds that belong to none of these; below 0 where memories overlap."""
        return self.seconds - self.blocks - self._of_core

    def kinds(self) -> dict[Span, str]:
        """Return the kind of each span: what the core does has its own, and a block its spec's."""
        specs = {part.name: part.kind for part in self.parts if part.backend}
        return {span: span.what.kind or specs.get(span.name, "block") for span in self.spans}

    @property
    def _of_core(self) -> float:
        return sum(part.seconds for part in self.parts if not part.backend)


def gathered(
    transport: Transport,
    profile: Profile,
    parts: Sequence[Part],
    samples: int,
    ceilings: Ceilings | None,
) -> list[OfRank]:
    """Return the profiles of all ranks on rank 0, and none elsewhere; every rank calls this."""
    world = transport.world
    if world.size > 1:
        parts = [*parts, _ending(profile)]
    mine = {
        "rank": world.rank,
        "machine": world.nodes[world.rank] if world.nodes else 0,
        "samples": samples,
        "seconds": profile.seconds,
        "parts": [asdict(part) | {"work": part.work._asdict()} for part in parts],
        "spans": [(*span.what, *span[1:]) for span in profile.timeline],
        "begin": profile.begin - profile.clocks[world.rank].seconds,
        "ceilings": ceilings,
    }
    lines = on_first(transport, json.dumps(mine))
    told = [json.loads(line) for line in lines or ()]
    first = min((one["begin"] for one in told), default=0.0)
    return [_of_rank(one, first, profile.clocks) for one in told]


def _ending(profile: Profile) -> Part:
    """Return the wait of a rank that has ended its forward for the last one that does."""
    both = zip(profile.plain, profile.own, strict=True)
    early = statistics.median(until_the_last - own for until_the_last, own in both)
    return Part(ENDING.name, ENDING.kind, "", HOST.name, early, Work(0, 0))


def _of_rank(told: dict[str, Any], first: float, clocks: Sequence[Ahead]) -> OfRank:
    late = told.pop("begin") - first
    parts = [Part(**part | {"work": Work(**part["work"])}) for part in told.pop("parts")]
    spans = [_span(span, late) for span in told.pop("spans")]
    ceilings = told.pop("ceilings")
    return OfRank(
        **told,
        parts=parts,
        spans=spans,
        ahead=clocks[told["rank"]],
        ceilings=None if ceilings is None else Ceilings(*ceilings),
    )


def _span(told: Sequence[Any], late: float) -> Span:
    """Return a span that was told as a list of its fields, those of `What` first."""
    block, part, kind, memory, begin, seconds, own = told
    return Span(What(block, part, kind), memory, begin + late, seconds, own)


def of_an_average_rank(ranks: Sequence[OfRank]) -> list[Part]:
    """Return the parts of all ranks with their mean seconds and work, in the order of rank 0's."""
    found: dict[tuple[str, str, str, str], list[Part]] = {}
    for rank in ranks:
        for part in rank.parts:
            key = part.name, part.kind, part.backend, part.memory
            found.setdefault(key, []).append(part)
    return [_mean(some, len(ranks)) for some in found.values()]


def _mean(parts: Sequence[Part], ranks: int) -> Part:
    work = sum((part.work for part in parts), Work(0, 0))
    mean = Work(work.flops / ranks, work.bytes / ranks)
    return replace(parts[0], seconds=sum(part.seconds for part in parts) / ranks, work=mean)


def mean_ceilings(ranks: Sequence[OfRank]) -> Ceilings | None:
    """Return what an average rank can do, as all of them measured at the same time."""
    told = [rank.ceilings for rank in ranks if rank.ceilings is not None]
    return Ceilings(*map(statistics.mean, zip(*told, strict=True))) if told else None


def slowest(ranks: Sequence[OfRank]) -> dict[tuple[str, str], float]:
    """Return the seconds of each kind and backend on the rank where they are most."""
    found: dict[tuple[str, str], float] = {}
    for rank in ranks:
        for key, seconds in _by_kind(rank.parts):
            found[key] = max(found.get(key, 0.0), seconds)
    return found


def _by_kind(parts: Sequence[Part]) -> Iterator[tuple[tuple[str, str], float]]:
    sums: dict[tuple[str, str], float] = {}
    for part in parts:
        key = part.kind, part.backend
        sums[key] = sums.get(key, 0.0) + part.seconds
    yield from sums.items()
