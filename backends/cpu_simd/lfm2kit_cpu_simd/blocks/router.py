"""The router: scores by the SIMD tile, the choice row by row; of float32 in every precision."""

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


class Router:
    def __init__(self, spec: specs.Router, weights: Weights, format: Format | None) -> None:
        self.spec = spec
        self.gate = pack([[weights["gate.weight"]]])
        bias = weights.float32("expert_bias") if spec.use_expert_bias else np.zeros(0, np.float32)
        self.bias = np.array(bias)
        self.scaling = np.float32(spec.routed_scaling_factor)

    def __call__(self, x: Float32) -> tuple[Int32, Float32]:
        logits = linear(x, self.gate, self.spec.num_experts)
        shape = (len(x), self.spec.num_experts_per_tok)
        expert_ids, expert_weights = np.empty(shape, np.int32), np.empty(shape, np.float32)
        _choose(
            logits, self.bias, self.spec.norm_topk_prob, self.scaling, expert_ids, expert_weights
        )
        return expert_ids, expert_weights


@numba.njit(inline="always")
def _sigmoid(logit: Any) -> Any:
    """In float64, rounded once: exactly 1 or 0 where float32 has nothing between."""
    return np.float32(1.0 / (1.0 + math.exp(-np.float64(logit))))


@numba.njit(inline="always")
def _rank(x: Any) -> Any:
    """An int32 that is larger for a larger float32 but -0, and above TAKEN for every one."""
    bits = np.float32(x).view(np.int32)
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


@kernel(
    types.void(ROWS, VECTOR, BOOL, FLOAT, IDS_OUT, ROWS_OUT),
    parallel=True,
    error_model="numpy",
)
def _choose(
    logits: Any, bias: Any, normalise: Any, scaling: Any, expert_ids: Any, expert_weights: Any
) -> None:
    """The bias selects the experts; it does not weigh them.  Where a score is NaN it selects alone,
    and the weights are NaN."""
    count, taken = logits.shape[1], expert_ids.shape[1]
    for row in numba.prange(logits.shape[0]):
        scores, ranks = np.empty(count, np.float32), np.empty(count, np.int32)
        is_nan = False
        for e in range(count):
            scores[e] = _sigmoid(logits[row, e])
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
            expert_ids[row, k] = best
            expert_weights[row, k] = scores[best]
            total += scores[best]
        for k in range(taken):
            weight = expert_weights[row, k]
            if normalise:
                weight = weight / (total + np.float32(1e-6))
            expert_weights[row, k] = np.float32(np.nan) if is_nan else weight * scaling
