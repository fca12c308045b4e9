"""The router where choices are close: saturated scores, ties, precision, size of the batch."""

from __future__ import annotations

import numpy as np

from lfm2kit.formats import BF16, F16, F32
from lfm2kit.promises import Promise
from lfm2kit.testing.cases import ROUTERS
from lfm2kit.testing.checks.registry import check, guards
from lfm2kit.testing.compare import assert_close, rows_of
from lfm2kit.testing.random_inputs import random_rows
from lfm2kit.testing.router_cases import WITHIN, judge_logits, routers
from lfm2kit.testing.trial import Trial


@check
def router_extreme_logits(trial: Trial) -> None:
    """At logits of +-120 and beyond a saturated sigmoid is exactly 1, and none is NaN.

    Logarithms of sigmoids underflow there and change the selection (onnxruntime-genai#2575);
    down to logits of -80 the scores are float32 numbers, and their order counts.
    """
    for norm_topk_prob in (True, False):
        for spec in routers(trial, use_expert_bias=False, norm_topk_prob=norm_topk_prob):
            rising = np.arange(spec.num_experts) / spec.num_experts
            logits = [
                np.full(spec.num_experts, -120.0),
                np.where(rising > 0.5, 120.0, -120.0),
                np.where(rising > 0.5, 500.0, 20.0),
                -80 + 60 * rising,
                -20 - 60 * rising,
                -80 + 15 * rising,
            ]
            judge_logits(trial, spec, np.array(logits), "of extreme logits")
    for spec in routers(trial, use_expert_bias=False, norm_topk_prob=False):
        saturated = np.repeat([[20.0], [120.0], [1e4]], spec.num_experts, axis=1)
        judge_logits(trial, spec, saturated, "of saturated scores", within=0)


@check
def router_ties(trial: Trial) -> None:
    """Among equal scores the lower expert id comes first.

    Exact ties are common: saturated scores are all 1.  `torch.topk` promises no order.
    """
    for spec in routers(trial, use_expert_bias=False):
        ids = np.arange(spec.num_experts)
        logits = [0.0 * ids, ids // 2 * 0.5, ids // 3 * -0.25]
        judge_logits(trial, spec, np.array(logits), "of equal logits")
    for spec in routers(trial, use_expert_bias=True):
        bias = np.where(np.arange(spec.num_experts) % 2, 0.25, 0.0)
        saturated = np.full((1, spec.num_experts), 120.0)
        judge_logits(trial, spec, saturated, "of saturated scores", bias)


@check
def choice_of_equal_scores(trial: Trial) -> None:
    """Equal scores give the same experts, also where several scores are 1 or 0.

    A block that is given the scores has no rounding of its own to blame.
    """
    for spec in trial.supported([router.choice for router in ROUTERS]):
        block, reference = trial.pair(spec)
        ids = np.arange(spec.num_experts)
        scores = np.stack([np.ones_like(ids), np.zeros_like(ids), ids % 2, ids // 2 / len(ids)])
        assert_close(
            block(scores.astype(np.float32)),
            reference(scores.astype(np.float32)),
            WITHIN,
            f"{spec} of equal scores",
        )


@check
def router_is_float32(trial: Trial) -> None:
    """Logits, scores and bias keep float32's resolution in every precision.

    Differences of 2^-12 decide here, which BF16, F16 and TF32 round away.  Elsewhere the bias was
    cast to BF16 (vllm#47797, Megatron-LM#1482) or the logits were (vllm#54048).  The bias is F32
    beside a gate of 16 bits, too, as in published checkpoints.
    """
    for spec in routers(trial, use_expert_bias=True):
        steps = np.arange(spec.num_experts) * 2.0**-12
        judge_logits(trial, spec, (1 + steps)[None], "of logits 2^-12 apart")
        level = np.ones((1, spec.num_experts))
        for stored in (F32, BF16, F16):
            what = f"of biases 2^-12 apart, with a gate in {stored}"
            judge_logits(trial, spec, level, what, 0.5 + steps, stored=stored)


@guards(Promise.BATCH_INVARIANCE)
def router_ids_independent_of_batch_size(trial: Trial) -> None:
    """The same rows are routed alike, to the last bit, in batches of 1, 8, 9, 33 and 128 rows.

    Elsewhere logits were rounded to BF16 in batches of more than 8 rows only (vllm#54048).
    """
    for spec in routers(trial):
        block = trial.build(spec, trial.random_weights(spec))
        x = random_rows(trial.rng, 128, spec.hidden_size)
        whole = block(x)
        for count in (1, 8, 9, 33):
            for start in (0, 128 - count):
                rows = slice(start, start + count)
                what = f"{spec}: rows {start} to {start + count - 1} alone and among 128"
                trial.assert_same(block(x[rows]), rows_of(whole, rows), what)
