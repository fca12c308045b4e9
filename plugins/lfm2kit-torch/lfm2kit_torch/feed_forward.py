"""The feed-forward blocks: MLP, router, its two parts, experts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lfm2kit import specs
from lfm2kit.backend import Weights
from lfm2kit_torch.device import Device
from lfm2kit_torch.linear import Linear, stored


class MLP:
    def __init__(self, spec: specs.MLP, weights: Weights, device: Device) -> None:
        names = ("w1", "w3", "w2")
        self.w1, self.w3, self.w2 = (Linear(weights.scope(name), device) for name in names)

    def __call__(self, x: Tensor) -> Tensor:
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class Scores:
    def __init__(self, spec: specs.Scores, weights: Weights, device: Device) -> None:
        self.gate = Linear(weights.scope("gate"), device)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.gate(x))


class Choice:
    def __init__(self, spec: specs.Choice, weights: Weights, device: Device) -> None:
        self.spec = spec
        self.bias = stored(weights, "expert_bias", device) if spec.use_expert_bias else None

    def __call__(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Choose experts by their biased scores, and weigh them by the scores alone."""
        # NaN has no order: the bias alone selects in such a row, whose weights become NaN.
        is_nan = scores.isnan().any(1, keepdim=True)
        biased = scores.masked_fill(is_nan, 0)
        if self.bias is not None:
            biased = biased + self.bias.float()
        # Of equal scores the lower id comes first, where `topk` promises nothing.
        ranked = torch.argsort(biased, dim=1, descending=True, stable=True)
        expert_ids = ranked[:, : self.spec.num_experts_per_tok]
        weights = scores.gather(1, expert_ids)
        if self.spec.norm_topk_prob:
            weights = weights / (weights.sum(1, keepdim=True) + 1e-6)
        weights = weights * self.spec.routed_scaling_factor
        return expert_ids.int(), weights.masked_fill(is_nan, torch.nan)


class Router:
    def __init__(self, spec: specs.Router, weights: Weights, device: Device) -> None:
        self.scores = Scores(spec.scores, weights, device)
        self.choice = Choice(spec.choice, weights, device)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.choice(self.scores(x))


class Experts:
    """A block that sorts (row, k) pairs by expert, and calls one MLP per expert."""

    def __init__(self, spec: specs.Experts, weights: Weights, device: Device) -> None:
        self.experts = {
            e: MLP(spec.expert, weights.scope(f"experts.{e}"), device) for e in spec.local_experts
        }

    def __call__(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        rows, top_k = expert_ids.shape
        weights = expert_weights.reshape(-1, 1)
        # What is not of these experts stays -0, which changes no bit of a sum.
        products = x.new_full((rows * top_k, x.shape[1]), -0.0)
        is_local = torch.zeros_like(expert_ids, dtype=torch.bool).flatten()
        for e, pairs in _pairs_by_expert(expert_ids):
            if e in self.experts:
                products[pairs] = weights[pairs] * self.experts[e](x[pairs // top_k])
                is_local[pairs] = True
        has_none = ~is_local.reshape(rows, top_k).any(1, keepdim=True)
        return _sum_in_order(products.unflatten(0, (rows, top_k))).masked_fill_(has_none, 0)


def _pairs_by_expert(expert_ids: Tensor) -> list[tuple[int, Tensor]]:
    """Return each id with its pairs, of number row * top_k + k.  The host waits once, for sizes."""
    ids, pairs = expert_ids.flatten().sort(stable=True)
    there, counts = ids.unique_consecutive(return_counts=True)
    there, counts = torch.stack([there, counts]).tolist()
    return list(zip(there, pairs.split(counts), strict=True))


def _sum_in_order(products: Tensor) -> Tensor:
    """Sum [rows, top_k, hidden_size] over k in its order, which `sum` need not keep."""
    delta = products[:, 0].clone()
    for k in range(1, products.shape[1]):
        delta += products[:, k]
    return delta
