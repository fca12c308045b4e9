"""Compares jobs of several numbers of ranks, interleaved, and says where their time goes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lfm2kit.measuring.exchanged import OPERATIONS
from lfm2kit.measuring.timing import Repeated
from lfm2kit.records.figures import values

Record = Mapping[str, Any]  # what `lfm2kit run --json` writes


class Job(NamedTuple):
    """A job to run, once per repetition: a forward of `samples` samples on `ranks` ranks."""

    plan: str
    ranks: int
    samples: int


class Parts(NamedTuple):
    """Where an average rank's seconds go.  Who comes last to an exchange waits for nobody."""

    compute: float
    exchange: float  # the gather of logits included
    waiting: float  # for other ranks


@dataclass(frozen=True, slots=True)
class Scaled(Repeated):
    """The records of a job's repetitions, and the medians of them."""

    job: Job
    records: Sequence[Record]

    @property
    def seconds(self) -> list[float]:
        return [values(record, "time")[0] for record in self.records]

    @property
    def parts(self) -> Parts | None:
        """Return the median of each part; None if the ranks' exchange does not count."""
        parts = [parts for record in self.records if (parts := parts_of(record)) is not None]
        return Parts(*map(statistics.median, zip(*parts, strict=True))) if parts else None

    @property
    def is_finite(self) -> bool:
        return all(record["finite"] for record in self.records)


def measure(jobs: Sequence[Job], repetitions: int, run: Callable[[Job], Record]) -> list[Scaled]:
    """Run every job `repetitions` times, one after the other, and return what came of each."""
    records: list[list[Record]] = [[] for _ in jobs]
    for _ in range(repetitions):
        for job, of_job in zip(jobs, records, strict=True):
            of_job.append(run(job))
    return [Scaled(job, of_job) for job, of_job in zip(jobs, records, strict=True)]


def speed_up(scaled: Scaled, among: Sequence[Scaled]) -> float:
    """Return how much faster a job is than the one of the fewest ranks that does the same."""
    same = (s for s in among if s.job._replace(ranks=scaled.job.ranks) == scaled.job)
    return min(same, key=lambda one: one.job.ranks).median / scaled.median


def parts_of(record: Record) -> Parts | None:
    """Return where the time of a run went, on average over its ranks; None if it is not known."""
    (seconds,) = values(record, "time")
    if record["ranks"] == 1:
        return Parts(seconds, 0.0, 0.0)
    exchanged = record.get("exchanged")
    has_exchange = max(map(len, record["groups"])) > 1
    if exchanged is None or (has_exchange and not exchanged["layers"]):
        return None
    operations = [layer[name] for layer in exchanged["layers"] for name in OPERATIONS]
    inside = [statistics.mean(one["seconds"]) for one in (*operations, exchanged["gather"])]
    waiting = statistics.mean(exchanged["waited_seconds"])
    return Parts(seconds - sum(inside), sum(inside) - waiting, waiting)
