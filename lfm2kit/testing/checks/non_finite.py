"""Checks that NaN and infinities reach the result of their row, and of no other sequence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from lfm2kit import specs
from lfm2kit.promises import Promise
from lfm2kit.specs import Choice, Router, Scores
from lfm2kit.testing.cases import CASES
from lfm2kit.testing.checks.registry import check, guards
from lfm2kit.testing.compare import Result, assert_close, each, rows_of
from lfm2kit.testing.host_block import HostBlock
from lfm2kit.testing.random_inputs import random_batch, random_inputs, random_rows
from lfm2kit.testing.random_weights import frozen_weights
from lfm2kit.testing.router_cases import WITHIN, routers
from lfm2kit.testing.sessions import Session, joined
from lfm2kit.testing.trial import Trial
from lfm2kit.testing.verdicts import CheckFailed
from lfm2kit.weights import Weights

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]

LENGTHS, ROW = (6, 11), 9  # the row lies in the second sequence
ROWS = sum(LENGTHS)
STEPS = ((0, 5), (5, 6), (6, 7), (7, 9))  # of nine rows


@guards(Promise.REPEATABILITY)
def non_finite_values_reach_the_result(trial: Trial) -> None:
    """A NaN or an infinity in a row makes its result NaN or infinite; other sequences keep theirs.

    Maxima, clamps and comparisons lose NaN, and a wrong model then looks right.  The last column,
    which may be apart from whole vectors, counts as the first.
    """
    kinds = [kind for kind in CASES if kind not in ("embed", "rows")]
    for spec in trial.first_of_kinds(kinds):
        block = trial.build(spec, trial.random_weights(spec))
        inputs = _of_two_sequences(trial, spec)
        clean = rows_of(block(*inputs), slice(0, LENGTHS[0]))
        is_router = isinstance(spec, Scores | Choice | Router)  # a sigmoid of infinity is finite
        values = [(np.nan, 0), (np.nan, -1), (np.inf, -1), (-np.inf, 0)]
        for value, column in values[: 2 if is_router else None]:
            for position, array in _floats(inputs):
                spoilt = [*inputs]
                spoilt[position] = _with(array, value, column)
                result = block(*spoilt)
                what = f"{spec} with {value} in row {ROW}, column {column} of argument {position}"
                _require_not_finite(each(rows_of(result, ROW)), what)
                trial.assert_same(
                    rows_of(result, slice(0, LENGTHS[0])), clean, f"{what}: other rows"
                )


@guards(Promise.REPEATABILITY)
def non_finite_values_stay_in_their_sequence(trial: Trial) -> None:
    """A NaN in a step reaches that sequence's later steps, by its state, and no other sequence.

    So does one in a prompt: all rows after it see it.
    """
    for spec in trial.first_of_kinds(("conv", "attn")):
        assert isinstance(spec, specs.ShortConv | specs.Attention)
        block = trial.build(spec, trial.random_weights(spec))
        rows = [random_rows(trial.rng, 9, spec.hidden_size) for _ in range(2)]
        clean, _ = _in_steps(spec, block, *rows)
        for first in (2, 5, 6):  # of the prompt, of the first step, of the second one
            spoilt = _with(rows[1], np.nan, -1, first)
            beside, after = _in_steps(spec, block, rows[0], spoilt)
            what = f"{spec} with NaN in row {first} of the other sequence, in steps"
            trial.assert_same(beside, clean, what)
            seen = slice(first, first + 2)  # a kernel of three taps sees as many
            if np.isfinite(rows_of(after, seen)).all(axis=1).any():
                raise CheckFailed(f"{spec}: a NaN in row {first} is lost in a later row")


def _in_steps(spec: specs.Spec, block: HostBlock, x: Float32, y: Float32) -> tuple[Result, Result]:
    """Return the results of two sequences that are fed beside each other."""
    session = Session(spec, block, np.random.default_rng(1))
    fed = [session.feed((0, x[a:b]), (1, y[a:b])) for a, b in STEPS]
    return joined([one for one, _ in fed]), joined([other for _, other in fed])


@check
def overflows_are_not_hidden(trial: Trial) -> None:
    """Rows whose squares overflow float32 give the right result or NaN, and no small numbers.

    The square root of an infinite sum divides a row down to zeros, which look like any others.
    """
    candidates = [*CASES["norm"]]
    if trial.is_exact:  # others may round what a projection returns to 16 bits
        candidates += CASES["attn"]
    for spec in trial.supported(candidates):
        block, reference = trial.pair(spec)
        inputs = random_inputs(spec, trial.rng, ROWS, scale=1e22)
        got, want = each(block(*inputs)), each(reference(*inputs))
        for array, expected in zip(got, want, strict=True):
            right_or_not_finite = np.where(np.isfinite(array), array, expected)
            what = f"{spec} with values of 1e22"
            assert_close(right_or_not_finite, expected, trial.tolerance, what)


@guards(Promise.REPEATABILITY)
def router_nan_scores(trial: Trial) -> None:
    """A row with a NaN score has NaN weights, and distinct experts that its bias allows.

    A sort puts NaN last and so hides it; a search for the largest may take one expert twice.
    Of row 0 all scores are NaN here, of another one only the last expert's.
    """
    for spec in routers(trial):
        bias = _masked_bias(trial, spec, allowed=spec.num_experts_per_tok + 1)
        block = trial.build(spec, _with_bias(trial, spec, bias))
        x = random_rows(trial.rng, ROWS, spec.hidden_size)
        clean = block(x)
        spoilt = np.isin(np.arange(ROWS), (0, ROW))
        x[0, 1], x[ROW, 0] = np.nan, np.inf
        ids, weights = block(x)
        _require_allowed(ids, np.isfinite(bias), f"{spec} with NaN scores")
        if not np.all(np.isnan(weights[spoilt])):
            raise CheckFailed(f"{spec}: weights {weights[spoilt]} of rows whose scores are NaN")
        what = f"{spec}, rows beside those with NaN scores"
        trial.assert_same((ids[~spoilt], weights[~spoilt]), rows_of(clean, ~spoilt), what)


@check
def router_masked_experts(trial: Trial) -> None:
    """An expert whose bias is -inf is never taken, whatever its score; nobody is taken twice.

    Pruned checkpoints have such biases.  A search that marks what it has taken by -inf takes the
    first expert again.
    """
    for spec in routers(trial):
        for allowed in (spec.num_experts_per_tok, spec.num_experts_per_tok + 1):
            bias = _masked_bias(trial, spec, allowed)
            block, reference = trial.pair(spec, _with_bias(trial, spec, bias))
            x = random_rows(trial.rng, ROWS, spec.hidden_size)
            got, want = block(x), reference(x)
            _require_allowed(got[0], np.isfinite(bias), f"{spec} with masked experts")
            # In the order of ids: two experts may come close to a tie here.
            assert_close(_by_id(got), _by_id(want), WITHIN, f"{spec} with {allowed} experts left")


def _of_two_sequences(trial: Trial, spec: specs.Spec) -> list[Any]:
    batch = random_batch(trial.rng, LENGTHS)
    inputs = random_inputs(spec, trial.rng, ROWS)
    return [batch if isinstance(value, type(batch)) else value for value in inputs]


def _floats(inputs: list[Any]) -> Iterator[tuple[int, Float32]]:
    for position, value in enumerate(inputs):
        if isinstance(value, np.ndarray) and value.dtype == np.float32:
            yield position, value


def _with(array: Float32, value: float, column: int, row: int = ROW) -> Float32:
    spoilt = array.copy()
    spoilt[row, column] = value
    return spoilt


def _require_not_finite(arrays: tuple[npt.NDArray[Any], ...], what: str) -> None:
    floats = [array for array in arrays if array.dtype == np.float32]
    if any(np.all(np.isfinite(array)) for array in floats):
        raise CheckFailed(f"{what}: the row's result is finite")


def _masked_bias(trial: Trial, spec: Router, allowed: int) -> Float32:
    """Return equal biases for some experts, the last one included, and -inf for the others."""
    bias = np.full(spec.num_experts, -np.inf, np.float32)
    bias[-1] = 0.25
    bias[1 + trial.rng.permutation(spec.num_experts - 2)[: allowed - 1]] = 0.25
    return bias


def _with_bias(trial: Trial, spec: Router, bias: Float32) -> Weights:
    """Return random weights except for the bias; the last expert ignores the first column."""
    gate = trial.random_weights(spec).float32("gate.weight").copy()
    gate[-1, 0] = 0
    return frozen_weights({"gate.weight": gate, "expert_bias": bias})


def _require_allowed(ids: Int32, is_allowed: npt.NDArray[np.bool_], what: str) -> None:
    is_expert = (ids >= 0) & (ids < len(is_allowed))
    if not np.all(is_expert) or not np.all(is_allowed[ids]):
        raise CheckFailed(f"{what}: took experts {sorted(set(ids.ravel().tolist()))}")
    ordered = np.sort(ids, axis=1)
    if np.any(ordered[:, 1:] == ordered[:, :-1]):
        raise CheckFailed(f"{what}: took an expert twice")


def _by_id(routing: tuple[Int32, Float32]) -> tuple[Int32, Float32]:
    ids, weights = routing
    order = np.argsort(ids, axis=1, kind="stable")
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(weights, order, axis=1)
