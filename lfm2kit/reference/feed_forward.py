"""The feed-forward blocks: MLP, router, its two parts, experts."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lfm2kit import specs
from lfm2kit.backend import Weights
from lfm2kit.reference.linear import Float32, linear

Int32 = npt.NDArray[np.int32]


class MLP:
    def __init__(self, spec: specs.MLP, weights: Weights) -> None:
        self.weights = weights

    def __call__(self, x: Float32) -> Float32:
        gate = linear(x, self.weights["w1.weight"])
        up = linear(x, self.weights["w3.weight"])
        silu = gate * _sigmoid(gate)
        return linear(silu * up, self.weights["w2.weight"]).astype(np.float32)


class Scores:
    def __init__(self, spec: specs.Scores, weights: Weights) -> None:
        self.weights = weights

    def __call__(self, x: Float32) -> Float32:
        return _sigmoid(linear(x, self.weights["gate.weight"]).astype(np.float32))


class Choice:
    def __init__(self, spec: specs.Choice, weights: Weights) -> None:
        self.spec = spec
        self.weights = weights

    def __call__(self, scores: Float32) -> tuple[Int32, Float32]:
        """Choose experts by their biased scores, and weigh them by the scores alone."""
        bias = self.weights.float32("expert_bias") if self.spec.use_expert_bias else np.float32(0)
        # NaN has no order: the bias alone selects in such a row, whose weights become NaN.
        is_nan = np.isnan(scores).any(axis=1, keepdims=True)
        biased = np.where(is_nan, np.float32(0), scores) + bias
        # A stable sort: of equal scores the lower id comes first.
        expert_ids = np.argsort(-biased, axis=1, kind="stable")[:, : self.spec.num_experts_per_tok]
        weights = np.take_along_axis(scores, expert_ids, axis=1)
        if self.spec.norm_topk_prob:
            weights = weights / (weights.sum(axis=1, keepdims=True) + np.float32(1e-6))
        weights = weights * np.float32(self.spec.routed_scaling_factor)
        return expert_ids.astype(np.int32), np.where(is_nan, np.float32(np.nan), weights)


class Router:
    def __init__(self, spec: specs.Router, weights: Weights) -> None:
        self.scores = Scores(spec.scores, weights)
        self.choice = Choice(spec.choice, weights)

    def __call__(self, x: Float32) -> tuple[Int32, Float32]:
        return self.choice(self.scores(x))


class Experts:
    def __init__(self, spec: specs.Experts, weights: Weights) -> None:
        self.experts = {
            e: MLP(spec.expert, weights.scope(f"experts.{e}")) for e in spec.local_experts
        }

    def __call__(self, x: Float32, expert_ids: Int32, expert_weights: Float32) -> Float32:
        """Return the sum of products, each rounded to float32 and added in the order of k.

        What is nobody's counts as -0, which changes no bit of a sum.
        """
        products = np.full((*expert_ids.shape, x.shape[1]), -0.0, dtype=np.float32)
        for e in np.unique(expert_ids[expert_ids >= 0]):
            rows, slots = np.nonzero(expert_ids == e)
            products[rows, slots] = expert_weights[rows, slots, None] * self.experts[int(e)](
                x[rows]
            )
        delta = products[:, 0].copy()
        for k in range(1, products.shape[1]):
            delta += products[:, k]
        delta[(expert_ids < 0).all(axis=1)] = 0
        return delta


def _sigmoid(a: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return 1 / (1 + exp(-a)) in the type of `a`, without overflow at either end."""
    e = np.exp(-np.abs(a))
    return np.asarray(np.where(a >= 0, 1 / (1 + e), e / (1 + e)))
