"""The router, where LFM2-MoE goes wrong most often and the text stays plausible (mlx-lm#1883)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lfm2kit.specs import Router
from lfm2kit.testing.checks.registry import check
from lfm2kit.testing.compare import assert_close, assert_same, rows_of
from lfm2kit.testing.near_ties import NEAR_TIE, selection_gaps
from lfm2kit.testing.random_inputs import random_rows
from lfm2kit.testing.random_weights import frozen_weights, random_weights
from lfm2kit.testing.trial import Trial

WITHIN = 2e-5  # of the largest weight, in every precision: the router is always float32


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
    spec = _first(trial, use_expert_bias=False, norm_topk_prob=True)
    _judge_logits(trial, spec, np.linspace(-12, -15, spec.num_experts)[None], "of tiny scores")


@check
def router_scaling(trial: Trial) -> None:
    """`routed_scaling_factor` multiplies the weights, after their normalisation (mlx-lm#1354)."""
    for factor in (0.5, 2.5):
        for norm_topk_prob in (True, False):
            _judge(trial, norm_topk_prob=norm_topk_prob, routed_scaling_factor=factor)


@check
def router_shape_grid(trial: Trial) -> None:
    """Numbers of experts that no tile divides, and 1 to 8 experts per token.

    Elsewhere the weights were wrong at one shape only (vLLM-metax#270).
    """
    grid = [(e, k) for e in (5, 12, 32, 33) for k in (1, 3, 4, 8) if k <= e]
    candidates = [Router(h, e, k, True, True, 1.5) for h in (24, 128) for e, k in grid]
    for spec in trial.supported(candidates):
        _judge_rows(trial, spec, 9)


@check
def router_extreme_logits(trial: Trial) -> None:
    """Logits of +-120 and beyond: a saturated sigmoid is exactly 1, none is NaN.

    Logarithms of sigmoids underflow there and change the selection (onnxruntime-genai#2575);
    down to logits of -80 the scores are float32 numbers, and their order counts.
    """
    for norm_topk_prob in (True, False):  # the last one's weights are the scores
        spec = _first(trial, use_expert_bias=False, norm_topk_prob=norm_topk_prob)
        rising = np.arange(spec.num_experts) / spec.num_experts
        logits = [
            np.full(spec.num_experts, 120.0),
            np.full(spec.num_experts, -120.0),
            np.where(rising > 0.5, 120.0, -120.0),
            np.where(rising > 0.5, 500.0, 20.0),
            -80 + 60 * rising,
            -20 - 60 * rising,
            -80 + 15 * rising,
        ]
        _judge_logits(trial, spec, np.array(logits), "of extreme logits")
    saturated = np.repeat([[20.0], [120.0], [1e4]], spec.num_experts, axis=1)
    _judge_logits(trial, spec, saturated, "of saturated scores", within=0)  # exactly 1


@check
def router_ties(trial: Trial) -> None:
    """Among equal scores the lower expert id comes first.

    Exact ties are common: saturated scores are all 1.  `torch.topk` promises no order.
    """
    spec = _first(trial, use_expert_bias=False, norm_topk_prob=True)
    count = spec.num_experts
    logits = [np.zeros(count), np.arange(count) // 2 * 0.5, -(np.arange(count) // 3) * 0.25]
    _judge_logits(trial, spec, np.array(logits), "of equal logits")
    spec = _first(trial, use_expert_bias=True, norm_topk_prob=True)
    bias = np.where(np.arange(spec.num_experts) % 2, 0.25, 0.0)
    saturated = np.full((1, spec.num_experts), 120.0)
    _judge_logits(trial, spec, saturated, "of saturated scores", bias)


@check
def router_is_float32(trial: Trial) -> None:
    """Logits, scores and bias keep float32's resolution in every precision.

    Differences of 2^-12 decide here, which BF16, F16 and TF32 round away.  Elsewhere the bias was
    cast to BF16 (vllm#47797, Megatron-LM#1482) or the logits were (vllm#54048).
    """
    spec = _first(trial, use_expert_bias=True, norm_topk_prob=True)
    steps = np.arange(spec.num_experts) * 2.0**-12
    _judge_logits(trial, spec, (1 + steps)[None], "of logits 2^-12 apart")
    level = np.ones((1, spec.num_experts))
    _judge_logits(trial, spec, level, "of biases 2^-12 apart", 0.5 + steps)


@check
def router_ids_independent_of_batch_size(trial: Trial) -> None:
    """The same rows are routed alike, to the last bit, in batches of 1, 8, 9, 33 and 128 rows.

    Elsewhere logits were rounded to BF16 in batches of more than 8 rows only (vllm#54048).
    """
    for spec in _routers(trial, use_expert_bias=True, norm_topk_prob=True):
        block = trial.build(spec, random_weights(spec, trial.rng))
        x = random_rows(trial.rng, 128, spec.hidden_size)
        whole = block(x)
        for count in (1, 8, 9, 33):
            for start in (0, 128 - count):
                rows = slice(start, start + count)
                what = f"{spec}: rows {start} to {start + count - 1} alone and among 128"
                assert_same(block(x[rows]), rows_of(whole, rows), what)


def _routers(trial: Trial, **changes: Any) -> list[Router]:
    """Routers of an odd and a usual size."""
    fields = {
        "use_expert_bias": True,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        **changes,
    }
    return trial.supported([Router(24, 5, 3, **fields), Router(128, 32, 4, **fields)])


def _first(trial: Trial, **changes: Any) -> Router:
    return _routers(trial, **changes)[0]


def _judge(trial: Trial, **changes: Any) -> None:
    for spec in _routers(trial, **changes):
        _judge_rows(trial, spec, 33)


def _judge_rows(trial: Trial, spec: Router, rows: int) -> None:
    """Random rows against the reference, but those near a tie."""
    weights = random_weights(spec, trial.rng)
    block, reference = trial.pair(spec, weights)
    x = random_rows(trial.rng, rows, spec.hidden_size)
    clear = np.flatnonzero(selection_gaps(spec, weights, x) > NEAR_TIE)
    assert_close(block(x), reference(x), WITHIN, f"{spec} at {rows} rows", clear)


def _judge_logits(
    trial: Trial,
    spec: Router,
    logits: npt.NDArray[Any],
    what: str,
    bias: npt.NDArray[Any] | None = None,
    within: float = WITHIN,
) -> None:
    """Rows with exactly these logits [rows, num_experts], whatever order a block adds in.

    Row r is 1 at r and 0 elsewhere, the gate's columns are the logits.
    """
    gate: npt.NDArray[Any] = np.zeros((spec.num_experts, spec.hidden_size), np.float32)
    gate[:, : len(logits)] = logits.T
    arrays: dict[str, npt.NDArray[np.float32]] = {"gate.weight": gate}
    if spec.use_expert_bias:
        bias = np.zeros(spec.num_experts) if bias is None else bias
        arrays["expert_bias"] = bias.astype(np.float32)
    block, reference = trial.pair(spec, frozen_weights(arrays))
    x = np.eye(len(logits), spec.hidden_size, dtype=np.float32)
    got, want = block(x), reference(x)
    for row in range(len(x)):  # apart: tiny weights are not to be measured by another row's
        one = slice(row, row + 1)
        assert_close(rows_of(got, one), rows_of(want, one), within, f"{spec} {what}, row {row}")
