"""No result depends on which other rows are in the batch, or on what was computed before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from lfm2kit import specs
from lfm2kit.batch import Batch
from lfm2kit.promises import Promise
from lfm2kit.specs import Spec
from lfm2kit.testing.cases import CASES
from lfm2kit.testing.checks.registry import check, guards
from lfm2kit.testing.compare import assert_same, each, rows_of
from lfm2kit.testing.host_block import HostBlock
from lfm2kit.testing.near_ties import GapWatch, Rows
from lfm2kit.testing.random_inputs import random_inputs
from lfm2kit.testing.trial import Trial
from lfm2kit.testing.verdicts import CheckFailed
from lfm2kit.weights import Weights

LENGTHS = (3, 16, 1, 7, 2, 9, 1)


@guards(Promise.BATCH_INVARIANCE)
def batch_independence(trial: Trial) -> None:
    """A sequence alone has the same bits as in a batch, and as in the batch in another order.

    For every kind of block and for every size that it is judged by.  Libraries of matrix products
    choose other kernels, with another order of summation, by the number of rows; in other
    implementations batching LFM2 changes its greedy output (llama.cpp#29002).
    """
    kinds = [kind for kind in CASES if kind != "rows"]
    for spec in trial.supported([spec for kind in kinds for spec in CASES[kind]]):
        weights = trial.random_weights(spec)
        block, rows = trial.build(spec, weights), _Sequences.random(spec, trial)
        clear = _clear_rows(trial, weights, rows)
        together = rows.run(block, range(len(LENGTHS)))
        for i in range(len(LENGTHS)):
            (alone,) = rows.run(block, [i])
            what = f"{spec}: {LENGTHS[i]} rows alone and in a batch of {sum(LENGTHS)}"
            trial.assert_same(alone, together[i], what, rows=clear[i])
        order = [int(i) for i in trial.rng.permutation(len(LENGTHS))]
        for i, permuted in zip(order, rows.run(block, order), strict=True):
            what = f"{spec}: {LENGTHS[i]} rows in a batch and in a permuted one"
            trial.assert_same(permuted, together[i], what, rows=clear[i])


@check
def zero_rows(trial: Trial) -> None:
    """Every block takes an empty batch: a rank of a parallel run may have no tokens."""
    for spec in trial.first_of_kinds():
        block, reference = trial.pair(spec)
        inputs = list(random_inputs(spec, trial.rng, 0))
        if isinstance(spec, specs.LastRows):
            inputs[2] = Batch.of_sequences([])
        assert_same(block(*inputs), reference(*inputs), f"{spec} at 0 rows")


@guards(Promise.REPEATABILITY)
def repeatable(trial: Trial) -> None:
    """The same call gives the same bits every time, without races or atomic additions."""
    for spec in trial.first_of_kinds():
        block = trial.build(spec, trial.random_weights(spec))
        inputs = random_inputs(spec, trial.rng, 33)
        first = block(*inputs)
        for _ in range(3):
            trial.assert_same(block(*inputs), first, f"{spec}, the same call again")


@guards(Promise.REPEATABILITY)
def scratch_is_not_seen(trial: Trial) -> None:
    """A block's earlier calls, even with NaN, do not change what it computes next.

    Blocks own buffers that are larger than a small batch; the rows beyond it are old ones.
    """
    for spec in trial.first_of_kinds():
        block = trial.build(spec, trial.random_weights(spec))
        inputs = random_inputs(spec, trial.rng, 5)
        clean = block(*inputs)
        block(*_poisoned(random_inputs(spec, trial.rng, 33)))
        trial.assert_same(block(*inputs), clean, f"{spec} after a batch of poison")


def _poisoned(inputs: Sequence[Any]) -> list[Any]:
    return [np.full_like(value, np.nan) if _is_float(value) else value for value in inputs]


def _is_float(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype == np.float32


@dataclass(frozen=True, slots=True)
class _Sequences:
    """Arguments for one call per sequence, of lengths LENGTHS, and ways to put them together."""

    spec: Spec
    inputs: list[tuple[Any, ...]]  # for each sequence
    token_ids: list[Any]

    @classmethod
    def random(cls, spec: Spec, trial: Trial) -> _Sequences:
        vocab = spec.vocab_size if isinstance(spec, specs.Embedding) else 10
        return cls(
            spec,
            [random_inputs(spec, trial.rng, n) for n in LENGTHS],
            [trial.rng.integers(vocab, size=n) for n in LENGTHS],
        )

    def run(self, block: HostBlock, chosen: Sequence[int]) -> list[Any]:
        """Call the block once over the chosen sequences; return each one's part of the result."""
        batch = Batch.of_sequences([self.token_ids[i] for i in chosen])
        result = block(*(self._joined(position, chosen, batch) for position in self._positions()))
        if any(len(array) != batch.tokens for array in each(result)):
            raise CheckFailed(f"{self.spec}: {batch.tokens} rows in, {len(each(result)[0])} out")
        ends = batch.cu_seqlens
        return [rows_of(result, slice(a, b)) for a, b in pairwise(ends)]

    def _positions(self) -> range:
        return range(len(self.inputs[0]))

    def _joined(self, position: int, chosen: Sequence[int], batch: Batch) -> Any:
        values = [self.inputs[i][position] for i in chosen]
        if values[0] is None:
            return None
        return batch if isinstance(values[0], Batch) else np.concatenate(values)


def _clear_rows(trial: Trial, weights: Weights, sequences: _Sequences) -> list[Rows]:
    """Return each sequence's rows of which no router is near a tie, where that may be seen.

    Other roundings of a layer's operator, where they are allowed, may turn such a choice round.
    """
    if trial.is_strict or not isinstance(sequences.spec, specs.Layer):
        return [slice(None)] * len(LENGTHS)
    watch, clear = GapWatch(trial.reference), []
    reference = trial.build_reference(sequences.spec, weights, watch)
    for i in range(len(LENGTHS)):
        watch.gaps.clear()
        sequences.run(reference, [i])
        clear.append(watch.clear_rows(trial.near_tie))
    return clear
