"""Judges a random example: a call of a block, or a program of sequences on an operator's state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from lfm2kit import specs
from lfm2kit.batch import Batch
from lfm2kit.specs import Spec
from lfm2kit.testing.compare import Result, assert_close, rows_of
from lfm2kit.testing.host_block import HostBlock
from lfm2kit.testing.near_ties import GapWatch, Rows, rows_among
from lfm2kit.testing.programs import ROOM, Fed, Program, Run
from lfm2kit.testing.random_inputs import random_inputs, random_rows
from lfm2kit.testing.random_weights import random_weights
from lfm2kit.testing.sessions import Float32, Session, hidden_size_of, joined, one_shot
from lfm2kit.testing.trial import Trial

USUAL = 33  # rows


def judge_call(trial: Trial, spec: Spec, lengths: Sequence[int], seed: int) -> None:
    """Judge one call: its values, and that each sequence has the bits that it has alone."""
    rng = np.random.default_rng(seed)
    weights = trial.as_taken(random_weights(spec, rng))
    watch = GapWatch(trial.reference)
    block, reference = trial.build(spec, weights), trial.build_reference(spec, weights, watch)
    inputs = random_inputs(spec, rng, sum(lengths), lengths=lengths)
    got, want = block(*inputs), reference(*inputs)
    what = f"{spec}, sequences of {list(lengths)} rows (seed {seed})"
    clear = watch.clear_rows(trial.near_tie)
    usual = partial(_usual, spec, reference, seed)
    assert_close(got, want, tolerance(trial, spec), what, clear, usual)
    if not isinstance(spec, specs.LastRows):
        _judge_each_alone(trial, block, inputs, lengths, got, what, clear, usual)


def _judge_each_alone(
    trial: Trial,
    block: HostBlock,
    inputs: Sequence[Any],
    lengths: Sequence[int],
    got: Result,
    what: str,
    clear: Rows,
    usual: Callable[[], Result],
) -> None:
    for i, (start, end) in enumerate(pairwise(accumulate(lengths, initial=0))):
        rows = slice(start, end)
        alone = block(*(_part(value, rows) for value in inputs))
        trial.assert_same(
            alone,
            rows_of(got, rows),
            f"{what}: sequence {i} alone and among others",
            2,
            rows=rows_among(clear, start, end),
            usual=usual,
        )


def _usual(spec: Spec, reference: HostBlock, seed: int) -> Result:
    """Return the result of another call, by which an error is measured."""
    result: Result = reference(*random_inputs(spec, np.random.default_rng([seed, 1]), USUAL))
    return result


def _part(value: Any, rows: slice) -> Any:
    """Return an argument for the rows of one sequence."""
    if isinstance(value, Batch):
        return Batch.of_sequences([value.token_ids[rows]])
    return None if value is None else value[rows]


def judge_program(trial: Trial, spec: Spec, program: Program) -> None:
    """Run a program on a state of a block: each sequence has the bits of one call without one."""
    Run(_Sequences(trial, spec, program.seed), program).judge()


class _Sequences:
    """A block of an operator or a layer as the subject of a program."""

    def __init__(self, trial: Trial, spec: Spec, seed: int) -> None:
        self._trial = trial
        self._spec = spec
        self._size = hidden_size_of(spec)
        rng = np.random.default_rng(seed)
        weights = trial.as_taken(random_weights(spec, rng))
        self._block, self._reference = trial.pair(spec, weights)
        self._usual = partial(_usual, spec, self._reference, seed)
        self._session = Session(spec, self._block, rng, ROOM)
        self.pages = self._session.pages
        self.feed = self._session.feed
        self._fill_pages_with_nan()

    def _fill_pages_with_nan(self) -> None:
        """Let other sequences have had all pages, so that what is read of them shows."""
        rows = np.full((ROOM.page_tokens, self._size), np.nan, np.float32)
        former = [(f"former {page}", rows) for page in range(ROOM.pages)]
        self.feed(*former)
        for name, _ in former:
            self.pages.drop(name)

    def draw(self, rng: np.random.Generator, tokens: int) -> Float32:
        return random_rows(rng, tokens, self._size)

    def judge(self, values: Float32, fed: Sequence[Fed], what: str) -> None:
        what = f"{self._spec}, {what}"
        rows = [row for one in fed for row in one.rows]
        got = joined([one.result for one in fed])
        want = rows_of(one_shot(self._spec, self._reference, values), rows)
        within = tolerance(self._trial, self._spec)
        assert_close(got, want, within, what, usual=self._usual)
        alone = rows_of(one_shot(self._spec, self._block, values), rows)
        what = f"{what}: in chunks and in one call"
        self._trial.assert_same(got, alone, what, 2, usual=self._usual)


def tolerance(trial: Trial, spec: Spec) -> float:
    """Return how far a result may be off: a layer's has the errors of two blocks."""
    return (2 if isinstance(spec, specs.Layer) else 1) * trial.tolerance
