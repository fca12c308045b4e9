"""MLP, experts and the sparse MoE: grouped products, rows sorted by expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from numba import types

from lfm2kit import specs
from lfm2kit.backend import Format, Weights
from lfm2kit_cpu_simd.blocks.router import Int32, Router
from lfm2kit_cpu_simd.buffers import BUFFERS
from lfm2kit_cpu_simd.compiling import kernel
from lfm2kit_cpu_simd.gemm import Float32, Int64, grouped, linear
from lfm2kit_cpu_simd.packing import pack, pack_gated
from lfm2kit_cpu_simd.signatures import (
    IDS,
    IDS_2D,
    INDICES_OUT,
    OFFSETS,
    PLACES,
    PLACES_OUT,
    ROWS,
    ROWS_OUT,
)


class MLP:
    def __init__(self, spec: specs.MLP, weights: Weights, format: Format | None) -> None:
        self.spec = spec
        w1, w3, w2 = (weights[f"{name}.weight"] for name in ("w1", "w3", "w2"))
        self.w13, self.w2 = pack_gated([w1], [w3], format), pack([[w2]], format)

    def __call__(self, x: Float32) -> Float32:
        inner = linear(x, self.w13, self.spec.intermediate_size, buffer="inner")
        return linear(inner, self.w2, self.spec.hidden_size)


class Experts:
    def __init__(self, spec: specs.Experts, weights: Weights, format: Format | None) -> None:
        self.spec = spec
        self.numbers = local_numbers(spec)
        matrices = {
            name: [weights[f"experts.{e}.{name}.weight"] for e in spec.local_experts]
            for name in ("w1", "w3", "w2")
        }
        if spec.local_experts:
            self.w13 = pack_gated(matrices["w1"], matrices["w3"], format)
            self.w2 = pack([[w2] for w2 in matrices["w2"]], format)

    def __call__(self, x: Float32, expert_ids: Int32, expert_weights: Float32) -> Float32:
        delta = np.empty_like(x)
        self.fill([delta], x, expert_ids, expert_weights)
        return delta

    def fill(
        self, results: Sequence[Float32], x: Float32, expert_ids: Int32, expert_weights: Float32
    ) -> None:
        (delta,) = results
        if not self.spec.local_experts:
            delta[...] = 0  # no pair is of a local expert
            return
        count = len(self.spec.local_experts)
        offsets, rows, places = sort_by_expert(expert_ids, self.numbers, count)
        size = self.spec.intermediate_size
        inner = grouped(_gather(x, rows), offsets, self.w13, size, buffer="inner")
        outputs = grouped(inner, offsets, self.w2, self.spec.hidden_size, buffer="outputs")
        _combine(outputs, places, expert_weights, delta)


class SparseMoe:
    def __init__(self, spec: specs.SparseMoe, weights: Weights, format: Format | None) -> None:
        self.router = Router(spec.router, weights, format)
        self.experts = Experts(spec.experts, weights, format)

    def __call__(self, x: Float32) -> Float32:
        return self.experts(x, *self.router(x))

    def fill(self, results: Sequence[Float32], x: Float32) -> None:
        self.experts.fill(results, x, *self.router(x))


def local_numbers(spec: specs.Experts) -> Int32:
    """Return each expert's place among the local ones, int32 [num_experts]; -1 for the others."""
    numbers = np.full(spec.num_experts, -1, np.int32)
    numbers[list(spec.local_experts)] = np.arange(len(spec.local_experts))
    return numbers


def sort_by_expert(expert_ids: Int32, numbers: Int32, count: int) -> tuple[Int64, Int64, Int64]:
    """Sort the (row, k) pairs by local expert, and leave them in their order within an expert.

    Return where the pairs of each of `count` experts begin [count + 1], each pair's row [pairs],
    and the place of each pair [rows, k].  A pair of no local expert has no row, and the place -1.
    """
    offsets = np.zeros(count + 1, np.int64)
    rows = np.empty(expert_ids.size, np.int64)
    places = np.empty(expert_ids.shape, np.int64)
    _sort(expert_ids, numbers, offsets, rows, places)
    return offsets, rows[: offsets[-1]], places


@kernel(types.void(IDS_2D, IDS, INDICES_OUT, INDICES_OUT, PLACES_OUT))
def _sort(expert_ids: Any, numbers: Any, offsets: Any, rows: Any, places: Any) -> None:
    """Sort by counting."""
    for expert in expert_ids.flat:
        if expert >= 0 and numbers[expert] >= 0:
            offsets[numbers[expert] + 1] += 1
    for e in range(1, offsets.shape[0]):
        offsets[e] += offsets[e - 1]
    following = offsets.copy()
    for row in range(expert_ids.shape[0]):
        for k in range(expert_ids.shape[1]):
            expert = expert_ids[row, k]
            number = numbers[expert] if expert >= 0 else -1
            if number < 0:
                places[row, k] = -1
                continue
            places[row, k] = following[number]
            rows[following[number]] = row
            following[number] += 1


def _gather(x: Float32, rows: Int64) -> Float32:
    out = BUFFERS.array("gathered", len(rows), x.shape[1])
    _copy_rows(x, rows, out)
    return out


@kernel(types.void(ROWS, OFFSETS, ROWS_OUT), parallel=True)
def _copy_rows(x: Any, rows: Any, out: Any) -> None:
    for i in numba.prange(rows.shape[0]):
        out[i] = x[rows[i]]


@kernel(types.void(ROWS, PLACES, ROWS, ROWS_OUT), parallel=True)
def _combine(outputs: Any, places: Any, weights: Any, delta: Any) -> None:
    """Compute delta[row], the sum over k, in order, of *rounded* products: no fused multiply-add,
    so that expert parallelism, which adds elsewhere, gets the same bits.  At -1 there is none."""
    for row in numba.prange(delta.shape[0]):
        is_first = True
        for k in range(places.shape[1]):
            place = places[row, k]
            if place < 0:
                continue
            if is_first:
                for c in range(delta.shape[1]):
                    delta[row, c] = weights[row, k] * outputs[place, c]
            else:
                for c in range(delta.shape[1]):
                    delta[row, c] += weights[row, k] * outputs[place, c]
            is_first = False
        if is_first:
            delta[row] = np.float32(0)
