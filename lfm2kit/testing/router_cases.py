"""What the checks of the router share: its specs, and rows of chosen logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lfm2kit.formats import F32, Format
from lfm2kit.specs import Router
from lfm2kit.testing.compare import assert_close, rows_of
from lfm2kit.testing.near_ties import NEAR_TIE, selection_gaps
from lfm2kit.testing.random_inputs import random_rows
from lfm2kit.testing.random_weights import frozen_weights, stored_as
from lfm2kit.testing.trial import Trial

WITHIN = 2e-5  # of the largest weight, in every precision: the router is always float32


def routers(trial: Trial, **changes: Any) -> list[Router]:
    """Return routers of an odd and a usual size."""
    fields = {
        "use_expert_bias": True,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        **changes,
    }
    return trial.supported([Router(24, 5, 3, **fields), Router(128, 32, 4, **fields)])


def judge_rows(trial: Trial, spec: Router, rows: int) -> None:
    """Compare random rows with the reference, except those near a tie."""
    weights = trial.random_weights(spec)
    block, reference = trial.pair(spec, weights)
    x = random_rows(trial.rng, rows, spec.hidden_size)
    clear = np.flatnonzero(selection_gaps(spec, weights, x) > NEAR_TIE)
    assert_close(block(x), reference(x), WITHIN, f"{spec} at {rows} rows", clear)


def judge_logits(
    trial: Trial,
    spec: Router,
    logits: npt.NDArray[Any],
    what: str,
    bias: npt.NDArray[Any] | None = None,
    within: float = WITHIN,
    stored: Format = F32,
) -> None:
    """Compare rows with exactly these logits [rows, num_experts], however a block adds.

    Row r is 1 at r and 0 elsewhere, the gate's columns are the logits; it is `stored` in a format
    that holds them, and the bias in F32.
    """
    gate: npt.NDArray[Any] = np.zeros((spec.num_experts, spec.hidden_size), np.float32)
    gate[:, : len(logits)] = logits.T
    arrays: dict[str, npt.NDArray[np.float32]] = {"gate.weight": gate}
    if spec.use_expert_bias:
        bias = np.zeros(spec.num_experts) if bias is None else bias
        arrays["expert_bias"] = bias.astype(np.float32)
    block, reference = trial.pair(spec, stored_as(frozen_weights(arrays), stored))
    x = np.eye(len(logits), spec.hidden_size, dtype=np.float32)
    got, want = block(x), reference(x)
    for row in range(len(x)):  # apart: tiny weights are not to be measured by another row's
        one = slice(row, row + 1)
        assert_close(rows_of(got, one), rows_of(want, one), within, f"{spec} {what}, row {row}")
