"""Compares what the ranks of a job are about to run, before they start.

Each rank reports facts, or why it cannot run.  All ranks get the same verdict, so that either all
of them go on or all of them end.  Ranks that differ would wait for each other for ever, or compute
something that nobody asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lfm2kit.errors import USER_ERROR, Lfm2kitError
from lfm2kit.transport import Transport, everyones

MOST_SHOWN = 3  # differences, or errors, in the one line
ABSENT = "missing"


class Fact(NamedTuple):
    """A value that all ranks must have in common or, if `is_own`, that no two ranks may share.

    `note` is shown, but not compared; nor is the name of a fact that is a rank's own.
    """

    value: str
    note: str = ""
    is_own: bool = False

    def __str__(self) -> str:
        return f"{self.value} ({self.note})" if self.note else self.value


Facts = Mapping[str, Fact]


class Refusal(NamedTuple):
    """The reason why a rank, or the whole job, cannot run, and the exit code for it."""

    sentence: str
    exit_code: int = USER_ERROR


class JointError(Lfm2kitError):
    """An error that every rank of a job raises, because they have told each other why."""


def agree(transport: Transport, report: Facts | Refusal) -> Refusal | None:
    """Return None if every rank reports the same facts, else the same refusal on every rank.

    This is collective: every rank of the job calls it, first before any other operation.
    """
    reports = on_first(transport, json.dumps(_packed(report)))
    refusal = None if reports is None else compared([_unpacked(r) for r in reports])
    verdict = _from_first(transport, json.dumps(refusal))
    return None if verdict == "null" else Refusal(*json.loads(verdict))


def least(transport: Transport, value: int) -> int:
    """Return the smallest value that a rank brings, on every rank; every rank calls it."""
    return int(everyones(transport, int(value)).min())


def compared(reports: Sequence[Facts | Refusal]) -> Refusal | None:
    """Return why ranks with these reports, in order of rank, cannot run together."""
    refusals = {rank: r for rank, r in enumerate(reports) if isinstance(r, Refusal)}
    if refusals:
        return _of_all(refusals, len(reports))
    facts = [report for report in reports if not isinstance(report, Refusal)]
    differences = [d for name in _names(facts) if (d := _difference(name, facts)) is not None]
    if differences:
        return Refusal(f"the ranks do not agree: {_joined(differences)}; start all of them alike")
    shared = [f"{_ranks(ranks)} would share {value}" for value, ranks in _shared(facts).items()]
    if shared:
        return Refusal(f"{_joined(shared)}; give each rank one of its own, or start fewer ranks")
    return None


def _names(reports: Sequence[Facts]) -> list[str]:
    """Return the names of all facts in order, including those that only some ranks have.

    Leaves out each rank's own.
    """
    places: dict[str, int] = {}
    for report in reports:
        for place, (name, fact) in enumerate(report.items()):
            if not fact.is_own:
                places[name] = max(place, places.get(name, place))
    return sorted(places, key=places.__getitem__)


def _shared(reports: Sequence[Facts]) -> dict[str, list[int]]:
    """Return the values that several ranks report as their own, with these ranks."""
    owners: dict[str, list[int]] = {}
    for rank, report in enumerate(reports):
        for value in {fact.value for fact in report.values() if fact.is_own}:
            owners.setdefault(value, []).append(rank)
    return {value: ranks for value, ranks in owners.items() if len(ranks) > 1}


def _of_all(refusals: Mapping[int, Refusal], size: int) -> Refusal:
    """Return the ranks' refusals as one; each sentence names the ranks that it comes from."""
    said: dict[str, list[int]] = {}
    for rank, refusal in refusals.items():
        said.setdefault(refusal.sentence, []).append(rank)
    exit_code = max(refusal.exit_code for refusal in refusals.values())
    if len(refusals) == size and len(said) == 1:  # no need to name ranks
        return Refusal(next(iter(said)), exit_code)
    return Refusal(_joined(f"{_ranks(r)}: {s}" for s, r in said.items()), exit_code)


def _difference(name: str, reports: Sequence[Facts]) -> str | None:
    """Return which ranks have which value of the fact `name`; None if all have the same."""
    groups: dict[str, list[int]] = {}
    shown: dict[str, str] = {}
    for rank, report in enumerate(reports):
        fact = report.get(name, Fact(ABSENT))
        groups.setdefault(fact.value, []).append(rank)
        shown.setdefault(fact.value, str(fact))
    if len(groups) == 1:
        return None
    return f"{name} is " + _and([f"{shown[v]} on {_ranks(ranks)}" for v, ranks in groups.items()])


def _joined(sentences: Iterable[str]) -> str:
    sentences = list(sentences)
    more = len(sentences) - MOST_SHOWN
    return "; ".join(sentences[:MOST_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _and(phrases: Sequence[str]) -> str:
    *first, last = phrases
    return f"{', '.join(first)} and {last}" if first else last


def _ranks(ranks: Sequence[int]) -> str:
    """Return "rank 2", "ranks 0, 3" or "ranks 1-7" for ascending `ranks`."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"ranks {ranks[0]}-{ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"


def _packed(report: Facts | Refusal) -> list[object]:
    return [*report] if isinstance(report, Refusal) else [dict(report)]


def _unpacked(text: str) -> Facts | Refusal:
    match json.loads(text):
        case [dict(facts)]:
            return {name: Fact(*fact) for name, fact in facts.items()}
        case [sentence, exit_code]:
            return Refusal(sentence, exit_code)
    raise ValueError(f"a rank reported {text[:80]!r}: is it another lfm2kit?")


def on_first(transport: Transport, line: str) -> list[str] | None:
    """Return every rank's line of ASCII, in order of rank, on rank 0; None on the others."""
    rows = transport.gather(_bytes(f"{line}\n"))
    return None if rows is None else rows.tobytes().decode().splitlines()


def _from_first(transport: Transport, text: str) -> str:
    """Return rank 0's text on every rank."""
    size = transport.world.size
    mine = _bytes(text if transport.world.rank == 0 else "")
    received, _ = transport.all_to_all(np.tile(mine, size), [len(mine)] * size)
    return received.tobytes().decode()


def _bytes(text: str) -> np.ndarray:  # json escapes all that is not ASCII
    return np.frombuffer(text.encode(), np.uint8)
