"""MLP, experts and the sparse MoE: grouped products, rows sorted by expert."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import types

from lfm2kit import specs
from lfm2kit.backend import Weights
from lfm2kit_cpu_simd.blocks.router import Int32, Router
from lfm2kit_cpu_simd.gemm import Float32, grouped, linear
from lfm2kit_cpu_simd.packing import pack, pack_gated
from lfm2kit_cpu_simd.signatures import PLACES, ROWS, ROWS_OUT


class MLP:
    def __init__(self, spec: specs.MLP, weights: Weights) -> None:
        self.spec = spec
        w1, w3, w2 = (weights[f"{name}.weight"] for name in ("w1", "w3", "w2"))
        self.w13, self.w2 = pack_gated([w1], [w3]), pack([[w2]])

    def __call__(self, x: Float32) -> Float32:
        inner = linear(x, self.w13, self.spec.intermediate_size)
        return linear(inner, self.w2, self.spec.hidden_size)


class Experts:
    def __init__(self, spec: specs.Experts, weights: Weights) -> None:
        self.spec = spec
        matrices = {
            name: [weights[f"experts.{e}.{name}.weight"] for e in spec.local_experts]
            for name in ("w1", "w3", "w2")
        }
        if spec.local_experts:
            self.w13 = pack_gated(matrices["w1"], matrices["w3"])
            self.w2 = pack([[w2] for w2 in matrices["w2"]])

    def __call__(self, x: Float32, expert_ids: Int32, expert_weights: Float32) -> Float32:
        if not self.spec.local_experts:
            return np.zeros_like(x)  # no id can be local: there are no rows
        local = expert_ids.reshape(-1) - np.int32(self.spec.local_experts.start)
        order = np.argsort(local, kind="stable")  # the (row, k) pairs by expert
        counts = np.bincount(local, minlength=len(self.spec.local_experts))
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        inner = grouped(
            x[order // expert_ids.shape[1]], offsets, self.w13, self.spec.intermediate_size
        )
        outputs = grouped(inner, offsets, self.w2, self.spec.hidden_size)
        delta = np.empty_like(x)
        _combine(outputs, _inverse(order).reshape(expert_ids.shape), expert_weights, delta)
        return delta


class SparseMoe:
    def __init__(self, spec: specs.SparseMoe, weights: Weights) -> None:
        self.router = Router(spec.router, weights)
        self.experts = Experts(spec.experts, weights)

    def __call__(self, x: Float32) -> Float32:
        return self.experts(x, *self.router(x))


def _inverse(order: npt.NDArray[np.intp]) -> npt.NDArray[np.int64]:
    """Where each (row, k) pair went."""
    places = np.empty(len(order), np.int64)
    places[order] = np.arange(len(order))
    return places


@numba.njit(
    types.void(ROWS, PLACES, ROWS, ROWS_OUT),
    parallel=True,
    cache=True,
)
def _combine(outputs: Any, places: Any, weights: Any, delta: Any) -> None:
    """delta[row] = the sum over k, in order, of the *rounded* products: no fused multiply-add,
    so that expert parallelism, which adds elsewhere, gets the same bits."""
    for row in numba.prange(delta.shape[0]):
        for c in range(delta.shape[1]):
            total = weights[row, 0] * outputs[places[row, 0], c]
            for k in range(1, places.shape[1]):
                total = total + weights[row, k] * outputs[places[row, k], c]
            delta[row, c] = total
