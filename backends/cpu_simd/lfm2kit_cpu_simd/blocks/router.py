"""The router and its parts: scores by the SIMD tile, the choice row by row; always in float32."""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import types

from lfm2kit import specs
from lfm2kit.backend import Format, Weights
from lfm2kit_cpu_simd.compiling import kernel
from lfm2kit_cpu_simd.gemm import Float32, linear
from lfm2kit_cpu_simd.packing import pack
from lfm2kit_cpu_simd.signatures import BOOL, FLOAT, IDS_OUT, ROWS, ROWS_OUT, VECTOR

Int32 = npt.NDArray[np.int32]

TAKEN = np.int32(-(2**31))  # below the rank of every number, -inf too: that is a bias


class Scores:
    def __init__(self, spec: specs.Scores, weights: Weights, format: Format | None) -> None:
        self.num_experts = spec.num_experts
        self.gate = pack([[weights["gate.weight"]]])

    def __call__(self, x: Float32) -> Float32:
        scores = self.logits(x)
        _score(scores)
        return scores

    def logits(self, x: Float32) -> Float32:
        return linear(x, self.gate, self.num_experts)


class Choice:
    def __init__(self, spec: specs.Choice, weights: Weights, format: Format | None) -> None:
        self.taken = spec.num_experts_per_tok
        bias = weights.float32("expert_bias") if spec.use_expert_bias else np.zeros(0, np.float32)
        self.bias = np.array(bias)
        self.normalise = spec.norm_topk_prob
        self.scaling = np.float32(spec.routed_scaling_factor)

    def __call__(self, scores: Float32) -> tuple[Int32, Float32]:
        return self.call(_choose, scores)

    def call(self, kernel: Any, rows: Float32) -> tuple[Int32, Float32]:
        """Call a kernel that chooses from scores or from logits [tokens, num_experts]."""
        shape = (len(rows), self.taken)
        expert_ids, expert_weights = np.empty(shape, np.int32), np.empty(shape, np.float32)
        kernel(rows, self.bias, self.normalise, self.scaling, expert_ids, expert_weights)
        return expert_ids, expert_weights


class Router:
    """A router that chooses from logits in one kernel, so that scores need no array of all rows."""

    def __init__(self, spec: specs.Router, weights: Weights, format: Format | None) -> None:
        self.scores = Scores(spec.scores, weights, format)
        self.choice = Choice(spec.choice, weights, format)

    def __call__(self, x: Float32) -> tuple[Int32, Float32]:
        return self.choice.call(_choose_of_logits, self.scores.logits(x))


@numba.njit(inline="always")
def _sigmoid(logit: Any) -> Any:
    """Return the sigmoid, computed in float64 and rounded once.

    It is exactly 1 or 0 where float32 has nothing between.
    """
    return np.float32(1.0 / (1.0 + math.exp(-np.float64(logit))))


@numba.njit(inline="always")
def _rank(x: Any) -> Any:
    """Return an int32 above TAKEN that is larger for a larger float32; -0 is below 0."""
    bits = np.float32(x).view(np.int32)
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


@numba.njit(inline="always")
def _choose_of_row(
    scores: Any, bias: Any, normalise: Any, scaling: Any, expert_ids: Any, expert_weights: Any
) -> None:
    """Choose the experts of a row; the bias selects them and does not weigh them.

    Where a score is NaN the bias selects alone, and the weights are NaN.
    """
    count, taken = scores.shape[0], expert_ids.shape[0]
    ranks = np.empty(count, np.int32)
    is_nan = False
    for e in range(count):
        is_nan |= math.isnan(scores[e])
    for e in range(count):
        biased = np.float32(0) if is_nan else scores[e]
        ranks[e] = _rank(biased + bias[e] if bias.size else biased)
    total = np.float32(0)
    for k in range(taken):
        best = 0
        for e in range(1, count):  # the first of equals stays
            if ranks[e] > ranks[best]:
                best = e
        ranks[best] = TAKEN
        expert_ids[k] = best
        expert_weights[k] = scores[best]
        total += scores[best]
    for k in range(taken):
        weight = expert_weights[k]
        if normalise:
            weight = weight / (total + np.float32(1e-6))
        expert_weights[k] = np.float32(np.nan) if is_nan else weight * scaling


@kernel(types.void(ROWS_OUT), parallel=True, error_model="numpy")
def _score(logits: Any) -> None:
    """Make scores of logits, in place."""
    for row in numba.prange(logits.shape[0]):
        for e in range(logits.shape[1]):
            logits[row, e] = _sigmoid(logits[row, e])


CHOOSES = types.void(ROWS, VECTOR, BOOL, FLOAT, IDS_OUT, ROWS_OUT)


@kernel(CHOOSES, parallel=True, error_model="numpy")
def _choose(
    scores: Any, bias: Any, normalise: Any, scaling: Any, expert_ids: Any, expert_weights: Any
) -> None:
    for row in numba.prange(scores.shape[0]):
        _choose_of_row(scores[row], bias, normalise, scaling, expert_ids[row], expert_weights[row])


@kernel(CHOOSES, parallel=True, error_model="numpy")
def _choose_of_logits(
    logits: Any, bias: Any, normalise: Any, scaling: Any, expert_ids: Any, expert_weights: Any
) -> None:
    for row in numba.prange(logits.shape[0]):
        scores = np.empty(logits.shape[1], np.float32)
        for e in range(logits.shape[1]):
            scores[e] = _sigmoid(logits[row, e])
        _choose_of_row(scores, bias, normalise, scaling, expert_ids[row], expert_weights[row])
