"""What goes wrong in attention: the form of the rotary embedding, its order, far positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from lfm2kit import specs
from lfm2kit.promises import Promise
from lfm2kit.testing.cases import CASES
from lfm2kit.testing.checks.registry import check, guards
from lfm2kit.testing.compare import assert_close
from lfm2kit.testing.random_inputs import random_batch, random_inputs, random_rows
from lfm2kit.testing.random_weights import frozen_weights
from lfm2kit.testing.trial import Trial
from lfm2kit.weights import Weights

Float64 = npt.NDArray[np.float64]

FAR = 1e-3  # at position 1000 the last bit of a float32 angle is 6e-5


@check
def rope_rotates_halves(trial: Trial) -> None:
    """RoPE pairs element i with i + head_dim / 2, not with its neighbour.

    All norm weights are 1 here, so that norm and rotation commute and only the pairing shows.
    """
    _judge_layernorm(trial, lambda size: np.ones(size))


@check
def norm_before_rope(trial: Trial) -> None:
    """q and k are normed before they are rotated.

    The norm weights differ so much from each other here that the order shows.
    """
    _judge_layernorm(trial, lambda size: np.linspace(0.2, 2, size))


@check
def rope_theta(trial: Trial) -> None:
    """`rope_theta` is read from the spec: 5000, 1e6 and 5e6 give different results.

    A missed setting means 10000 elsewhere, and short prompts still look right (mlx-lm#908).
    """
    for spec in _attentions(trial):
        weights = trial.random_weights(spec)
        for theta in (5000.0, 1e6, 5e6):
            block, reference = trial.pair(replace(spec, rope_theta=theta), weights)
            inputs = random_inputs(spec, trial.rng, 33)
            what = f"{spec} with rope_theta {theta:g}"
            assert_close(block(*inputs), reference(*inputs), trial.tolerance, what)


@check
def rope_beyond_position_1000(trial: Trial) -> None:
    """In a sequence of 1050 tokens angles stay float32, and no table of positions ends early.

    Judged by the last 20 rows.  Angles in BF16, or in F16, are off by whole turns there.
    """
    spec = _attentions(trial)[0]
    block, reference = trial.pair(spec)
    x = random_rows(trial.rng, 1050, spec.hidden_size)
    inputs = x, random_batch(trial.rng, [1050]), None
    got, want = block(*inputs)[-20:], reference(*inputs)[-20:]
    assert_close(got, want, max(FAR, trial.tolerance), f"{spec}, rows 1030 to 1049")


@check
def attention_large_scores(trial: Trial) -> None:
    """Scores beyond 100 do not overflow: the maximum is subtracted before exponentials."""
    _judge_layernorm(trial, lambda size: np.full(size, 8.0), 10 * trial.tolerance)


@guards(Promise.REPEATABILITY)
def attention_is_causal(trial: Trial) -> None:
    """A row's result has the same bits whatever stands in the rows after it, NaN even.

    A weight of 0 does not mask a value that is not finite: 0 * NaN is NaN.
    """
    for spec in _attentions(trial):
        block = trial.build(spec, trial.random_weights(spec))
        x, batch = random_rows(trial.rng, 33, spec.hidden_size), random_batch(trial.rng, [33])
        for first in (1, 20, 31, 32):
            want = block(x, batch, None)[:first]
            others = random_rows(trial.rng, 33 - first, spec.hidden_size, 50.0)
            for rows in (others, np.full_like(others, np.nan), np.full_like(others, np.inf)):
                changed = np.concatenate([x[:first], rows])
                trial.assert_same(
                    block(changed, batch, None)[:first], want, f"{spec}, from row {first}"
                )


def _attentions(trial: Trial) -> list[specs.Attention]:
    return trial.supported([s for s in CASES["attn"] if isinstance(s, specs.Attention)])


def _judge_layernorm(
    trial: Trial, weight: Callable[[int], Float64], within: float | None = None
) -> None:
    """Compare with these weights [head_dim] of q_layernorm and k_layernorm."""
    for spec in _attentions(trial):
        block, reference = trial.pair(spec, _with_layernorm(trial, spec, weight(spec.head_dim)))
        inputs = random_inputs(spec, trial.rng, 33)
        assert_close(block(*inputs), reference(*inputs), within or trial.tolerance, str(spec))


def _with_layernorm(trial: Trial, spec: specs.Attention, weight: Float64) -> Weights:
    arrays = {n: t.float32().copy() for n, t in trial.random_weights(spec).items()}
    for name in ("q_layernorm.weight", "k_layernorm.weight"):
        arrays[name][:] = weight
    return frozen_weights(arrays)
