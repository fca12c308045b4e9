"""Measured rows, and the Markdown that they become."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from contenders import Contender
from tasks import PEAK_SHARES, READ_SHARES, Task, ratio_goal

from lfm2kit.backend import Ceilings

HEAD = (
    "test",
    "lfm2kit",
    "rival",
    "its",
    "unit",
    "ratio (goal)",
    "of FMA peak",
    "of reading",
    "max abs diff",
)


@dataclass(frozen=True)
class Row:
    """The result of lfm2kit and one rival at one task."""

    dtype: str
    task: str
    rival: str
    amount: int
    unit: str
    flops: float  # the least that an answer takes
    bytes: float
    seconds: Sequence[float]
    rival_seconds: Sequence[float]
    difference: float
    peak_flops: float
    peak_bytes: float

    @classmethod
    def of(
        cls,
        task: Task,
        ours: Contender,
        rival: Contender,
        seconds: Sequence[Sequence[float]],
        difference: float,
        ceilings: Ceilings,
    ) -> Row:
        names = (ours.dtype, task.name, rival.name, task.amount, task.unit)
        our_seconds, rival_seconds = seconds
        return cls(*names, *task.work, our_seconds, rival_seconds, difference, *ceilings)

    @property
    def ratio(self) -> float:
        return statistics.median(self.rival_seconds) / statistics.median(self.seconds)

    def cells(self) -> tuple[str, ...]:
        median = statistics.median(self.seconds)
        return (
            self.task,
            _rate(self.amount, self.seconds),
            self.rival,
            _rate(self.amount, self.rival_seconds),
            self.unit,
            f"{self.ratio:.2f}" + _goal(ratio_goal(self.dtype, self.task, self.rival), self.ratio),
            _share(self.flops / median / self.peak_flops, PEAK_SHARES.get((self.dtype, self.task))),
            _share(self.bytes / median / self.peak_bytes, READ_SHARES.get((self.dtype, self.task))),
            f"{self.difference:.1e}",
        )


def table(rows: Sequence[Row]) -> str:
    """Return the rows, task by task, and the ceilings that the shares refer to."""
    order = list(dict.fromkeys(row.task for row in rows))
    in_order = sorted(rows, key=lambda row: order.index(row.task))
    lines = [HEAD, ("---",) * len(HEAD), *(row.cells() for row in in_order)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n" + _ceilings(rows)


def _ceilings(rows: Sequence[Row]) -> str:
    flops = [row.peak_flops / 1e9 for row in rows]
    reads = [row.peak_bytes / 1e9 for row in rows]
    return (
        f"FMA peak {min(flops):.0f} to {max(flops):.0f} GFLOP/s, reading {min(reads):.1f} to "
        f"{max(reads):.1f} GB/s, the best of each bout; shares are of the own bout's."
    )


def _rate(amount: int, seconds: Sequence[float]) -> str:
    median = statistics.median(seconds)
    spread = (max(seconds) - min(seconds)) / median
    return f"{amount / median:,.{0 if amount / median >= 100 else 2}f} ({100 * spread:.0f} %)"


def _share(share: float, goal: float | None) -> str:
    text = f"{100 * share:.0f} %"
    return text if goal is None else f"{text} ({100 * goal:.0f} %, {_verdict(share, goal)})"


def _goal(goal: float | None, ratio: float) -> str:
    return "" if goal is None else f" ({goal}, {_verdict(ratio, goal)})"


def _verdict(reached: float, goal: float) -> str:
    return "met" if reached >= goal else "missed"
