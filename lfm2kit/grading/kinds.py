"""FP16 beside FP32 by kind of block: how much faster each is, and what limits it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lfm2kit.backend import Ceilings
from lfm2kit.grading.models import SEQ_LEN, TWICE, Built
from lfm2kit.measuring.bench import Limit, random_batch
from lfm2kit.profiling.figures import Total, parts_of, totals
from lfm2kit.profiling.forwards import Prompt, Stage, profiled

MOST = 0.9  # of FP16's time, which the kinds that are told of take together


class KindGrade(NamedTuple):
    """All blocks of a kind that one backend builds, in FP32 and in FP16, inside whole forwards."""

    kind: str
    backend: str
    seconds: float
    half_seconds: float
    limit: str | None  # the unit that limits FP16 at the measured ceilings; None: not known
    roofline: float | None  # the time that FP16's work takes at the ceilings, over what it took

    @property
    def factor(self) -> float:
        """Return how many times as fast FP16 is."""
        return self.seconds / self.half_seconds


def by_kind(
    one: Built, half: Built, n: int, repetitions: int, ceilings: Ceilings | None, stage: Stage
) -> list[KindGrade]:
    """Return the kinds of blocks, the longest in FP16 first; `ceilings` are FP16's."""
    whole = {(t.kind, t.backend): t.seconds for t in _totals(one, n, repetitions, None, stage)}
    return [
        KindGrade(
            total.kind,
            total.backend,
            whole[total.kind, total.backend],
            total.seconds,
            None if ceilings is None else Limit.of(total.work, ceilings).unit,
            total.roofline,
        )
        for total in _totals(half, n, repetitions, ceilings, stage)
        if (total.kind, total.backend) in whole and total.seconds > 0
    ]


def _totals(
    built: Built, n: int, repetitions: int, ceilings: Ceilings | None, stage: Stage
) -> list[Total]:
    batch = random_batch(n, SEQ_LEN, built.model.spec.embed_tokens.vocab_size, seed=n)
    profile = profiled(built.model, built.blocks, Prompt(batch), repetitions, stage)
    return list(totals(parts_of(built.setup, profile, batch), ceilings))


def reasons(kinds: Sequence[KindGrade]) -> Iterator[str]:
    """Yield a sentence for each kind that keeps FP16 below twice the speed of FP32."""
    all_seconds, told = sum(kind.half_seconds for kind in kinds), 0.0
    for one in kinds:
        if one.factor < TWICE and told < MOST * all_seconds:
            share = one.half_seconds / all_seconds
            yield (
                f"{one.kind} takes {share:.0%} of FP16's time and is {one.factor:.2f} times as "
                f"fast as in FP32{_limited(one)}"
            )
        told += one.half_seconds


def _limited(one: KindGrade) -> str:
    if one.limit is None or one.roofline is None:
        return ""
    return f" ({one.limit} limits it, and it reaches {one.roofline:.0%} of that limit)"
