"""Runs samples through a model in batches, alone or as one of several ranks, and times it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lfm2kit import progress
from lfm2kit.batch import Batch
from lfm2kit.measuring import exchanged
from lfm2kit.measuring.exchanged import Exchanged
from lfm2kit.measuring.gathering import gather_over
from lfm2kit.model import LFM2
from lfm2kit.transport import Transport, World, share

TOKENS_PER_BATCH = 4096  # by default: enough to be compute-bound, small enough for any machine


class Timed(NamedTuple):
    """The logits [n, vocab_size] of all samples, how long they took, and what ranks exchanged."""

    logits: npt.NDArray[np.float32] | None  # None but on rank 0
    seconds: float
    exchanged: Exchanged | None = None  # None but on rank 0 of several


def default_batch_size(seq_len: int) -> int:
    return max(1, TOKENS_PER_BATCH // seq_len)


def run_samples(
    model: LFM2,
    inputs: npt.NDArray[np.int32],
    batch_size: int,
    *,
    transport: Transport | None = None,
    groups: Sequence[Sequence[int]] | None = None,
    done: Callable[[int], None] = lambda samples: None,
) -> Timed:
    """Return the last token's logits of each sample of `inputs` int32 [n, seq_len], and the time.

    There is at least one sample.  The samples are shared out over the ranks of `transport`, which
    exchange tokens inside `groups`, or with all others; every rank makes the same number of
    forwards, some perhaps of no samples, because they exchange tokens in each.
    """
    world = transport.world if transport is not None else World()
    own = share(len(inputs), world.size, world.rank)
    mine = inputs[own.start : own.stop]
    largest = -(-len(inputs) // world.size)  # samples of the rank that has most
    exchanged.begin(model)
    if transport is not None:
        batch = Batch.of_sequences(list(inputs[: min(largest, batch_size)]))
        progress.allow_forward(model.placed.leaves(), batch, world.size)
    gather = gather_over(transport, len(inputs), model.spec.lm_head.vocab_size)

    def logits_of(rows: slice) -> npt.NDArray[np.float32]:
        logits = model.logits(Batch.of_sequences(list(mine[rows])))
        done(len(mine[rows]))
        return logits

    *earlier, last = (slice(i, i + batch_size) for i in range(0, largest, batch_size))
    start = _now(transport)
    for rows in earlier:
        gather.begin(rows, logits_of(rows))
    logits = gather.end(last, logits_of(last))
    seconds = _now(transport) - start
    if transport is None:
        return Timed(logits, seconds)
    groups = groups or [range(world.size)]
    return Timed(logits, seconds, exchanged.ended(model, transport, gather.sent, groups))


def _now(transport: Transport | None) -> float:
    """Return the time at which all ranks are here."""
    if transport is not None:
        transport.barrier()
    return time.perf_counter()
