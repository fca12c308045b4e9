"""The router, where LFM2-MoE goes wrong most often and the text stays plausible (mlx-lm#1883)."""

from __future__ import annotations

from typing import Any

import numpy as np

from lfm2kit.promises import Promise
from lfm2kit.specs import Choice, Router
from lfm2kit.testing.checks.registry import check, guards
from lfm2kit.testing.compare import assert_close
from lfm2kit.testing.near_ties import NEAR_TIE, choice_gaps
from lfm2kit.testing.random_inputs import random_inputs, random_rows
from lfm2kit.testing.router_cases import WITHIN, judge_logits, judge_rows, routers
from lfm2kit.testing.trial import Trial
from lfm2kit.testing.verdicts import Skipped


@check
def router_sigmoid_not_softmax(trial: Trial) -> None:
    """An expert's score is the sigmoid of its own logit, not a softmax over all of them.

    A softmax selects the same experts where there is no bias, and weighs them wrongly
    (mlx-lm#1883).
    """
    _judge(trial, use_expert_bias=False, norm_topk_prob=False)


@check
def router_bias_selects_but_does_not_weigh(trial: Trial) -> None:
    """`expert_bias` is added to the scores to select, and is not in the weights (mlx-lm#1883).

    The bias here turns round most selections, and would be most of each weight.
    """
    for norm_topk_prob in (True, False):
        _judge(trial, use_expert_bias=True, norm_topk_prob=norm_topk_prob)


@check
def router_without_bias(trial: Trial) -> None:
    """With `use_expert_bias` false there is no `expert_bias` to ask for."""
    _judge(trial, use_expert_bias=False, norm_topk_prob=True)


@check
def router_normalisation(trial: Trial) -> None:
    """`norm_topk_prob` divides the weights by (their sum + 1e-6); without it they stay scores.

    Elsewhere the flag never reached the kernel (flashinfer#2889).  Scores as small as 1e-6 show
    the 1e-6 in the denominator.
    """
    for norm_topk_prob in (True, False):
        _judge(trial, use_expert_bias=True, norm_topk_prob=norm_topk_prob)
    for spec in routers(trial, use_expert_bias=False):
        tiny = np.linspace(-12, -15, spec.num_experts)[None]
        judge_logits(trial, spec, tiny, "of tiny scores")


@check
def router_scaling(trial: Trial) -> None:
    """`routed_scaling_factor` multiplies the weights, after their normalisation (mlx-lm#1354)."""
    for factor in (0.5, 2.5):
        for norm_topk_prob in (True, False):
            _judge(trial, norm_topk_prob=norm_topk_prob, routed_scaling_factor=factor)


@check
def router_shape_grid(trial: Trial) -> None:
    """The router is right for counts of experts that no tile divides, and for 1 to 8 per token.

    Elsewhere the weights were wrong at one shape only (vLLM-metax#270).
    """
    grid = [(e, k) for e in (5, 12, 32, 33) for k in (1, 3, 4, 8) if k <= e]
    grid += [(1, 1), (4, 4), (8, 8)]  # where every expert is taken
    candidates = [Router(h, e, k, True, True, 1.5) for h in (24, 128) for e, k in grid]
    for spec in trial.supported(candidates):
        judge_rows(trial, spec, 9)
    for choice in trial.built(dict.fromkeys(spec.choice for spec in candidates)):
        _judge_choice(trial, choice)


def _judge_choice(trial: Trial, spec: Choice) -> None:
    """Compare a choice alone, of random scores, except where they are near a tie."""
    weights = trial.random_weights(spec)
    block, reference = trial.pair(spec, weights)
    (scores,) = random_inputs(spec, trial.rng, 9)
    clear = np.flatnonzero(choice_gaps(spec, weights, scores) > NEAR_TIE)
    assert_close(block(scores), reference(scores), WITHIN, str(spec), clear)


@guards(Promise.REPEATABILITY)
def router_apart_equals_together(trial: Trial) -> None:
    """A router that is built whole has the bits of its scores and its choice built apart.

    So a model's result does not depend on who computes the choice, nor where.
    """
    for spec in routers(trial):
        parts = [part.spec for part in spec.parts()]
        if trial.backend.why_unsupported(spec) is not None or len(trial.built(parts)) < len(parts):
            raise Skipped("it does not build a router both whole and in its parts")
        weights = trial.random_weights(spec)
        router, scores, choice = (trial.build(one, weights) for one in (spec, *parts))
        for rows in (0, 1, 17, 33):
            x = random_rows(trial.rng, rows, spec.hidden_size)
            what = f"{spec} at {rows} rows, whole and as scores and choice"
            trial.assert_same(router(x), choice(scores(x)), what)


def _judge(trial: Trial, **changes: Any) -> None:
    for spec in routers(trial, **changes):
        judge_rows(trial, spec, 33)
