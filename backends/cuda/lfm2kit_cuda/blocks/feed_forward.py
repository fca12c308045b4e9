"""MLP, experts and the sparse MoE: grouped products over rows sorted by expert on the device."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from lfm2kit import specs
from lfm2kit.backend import Block, Weights
from lfm2kit_cuda.blocks.router import Router
from lfm2kit_cuda.constants import EXPERTS
from lfm2kit_cuda.kernels import Kernel, load_kernel
from lfm2kit_cuda.products import Activations, Arithmetic, RowTiles, padded
from lfm2kit_cuda.upload import upload

GROUP_THREADS, COMBINE_THREADS = EXPERTS.GROUP_THREADS, 512
ALIGNMENT = EXPERTS.ALIGNMENT
COMBINED = {np.float32: "F32", np.uint16: "BF16"}  # what `down` returns


class MLP:
    def __init__(self, spec: specs.MLP, weights: Weights, gemm: Arithmetic) -> None:
        self.gemm = gemm
        self.w13 = gemm.pack_gated([weights["w1.weight"]], [weights["w3.weight"]])
        self.w2 = gemm.pack_down([weights["w2.weight"]])

    def __call__(self, x: cupy.ndarray) -> cupy.ndarray:
        return self.of(Activations(x, self.gemm.rounded(x)))

    def of(self, inputs: Activations) -> cupy.ndarray:
        """Do what a call does, with an input that is rounded already."""
        return self.gemm.linear(self.gemm.gated(inputs.rounded, self.w13), self.w2)


class Experts:
    def __init__(self, spec: specs.Experts, weights: Weights, gemm: Arithmetic) -> None:
        self.spec = spec
        self.gemm = gemm
        w1, w3, w2 = (
            [weights[f"experts.{e}.{name}.weight"] for e in spec.local_experts]
            for name in ("w1", "w3", "w2")
        )
        self.local = upload(np.array(spec.local_experts, np.int32))
        if spec.local_experts:
            self.w13, self.w2 = gemm.pack_gated(w1, w3), gemm.pack_down(w2)

    def __call__(
        self, x: cupy.ndarray, expert_ids: cupy.ndarray, expert_weights: cupy.ndarray
    ) -> cupy.ndarray:
        return self.of(self.gemm.rounded(x), expert_ids, expert_weights)

    def of(
        self, rounded: Any, expert_ids: cupy.ndarray, expert_weights: cupy.ndarray
    ) -> cupy.ndarray:
        """Do what a call does, with an input that is rounded already."""
        h, (tokens, taken) = self.spec.hidden_size, expert_ids.shape
        if not self.spec.local_experts:
            return cupy.zeros((tokens, h), cupy.float32)  # every pair is nobody's
        tiles, place = grouped_by_expert(expert_ids, self.local, self.spec.num_experts, self.gemm)
        outputs = self.gemm.down(self.gemm.gated(rounded, self.w13, tiles), self.w2, tiles)
        delta = cupy.empty((tokens, h), cupy.float32)
        combine = _kernel(f"combine_{COMBINED[outputs.dtype.type]}", taken, h)
        combine((tokens,), COMBINE_THREADS, outputs, place, expert_weights, delta, h)
        return delta


class SparseMoe:
    """A router and its experts; the router takes a `choice` that lies elsewhere, if given one."""

    def __init__(
        self,
        spec: specs.SparseMoe,
        weights: Weights,
        gemm: Arithmetic,
        choice: Block | None = None,
    ) -> None:
        self.router = Router(spec.router, weights, gemm, choice)
        self.experts = Experts(spec.experts, weights, gemm)

    def __call__(self, x: cupy.ndarray) -> cupy.ndarray:
        return self.experts(x, *self.router(x))

    def of(self, inputs: Activations) -> cupy.ndarray:
        """Do what a call does, with an input that is rounded already."""
        return self.experts.of(inputs.rounded, *self.router(inputs.x))


def grouped_by_expert(
    expert_ids: cupy.ndarray, local: cupy.ndarray, experts: int, gemm: Arithmetic
) -> tuple[RowTiles, cupy.ndarray]:
    """Sort the (token, k) pairs by expert.

    Return the tiles of their rows, and the slot of each pair, int32 [pairs]: -1 if it is nobody's.
    `local` int32 are the ids of the experts that are here, of `experts` in all.
    """
    pairs, taken = expert_ids.size, expert_ids.shape[1]
    slots = padded(pairs + (ALIGNMENT - 1) * min(pairs, len(local)), ALIGNMENT)
    source, place = cupy.empty(slots, cupy.int32), cupy.empty(pairs, cupy.int32)
    tiling = gemm.tiling(pairs, len(local))
    tiles = cupy.empty((min(pairs, pairs // tiling.rows + len(local)), 4), cupy.int32)
    count = cupy.empty(1, cupy.int32)
    group = _kernel("group_by_expert", taken, shared_bytes=4 * (experts + len(local)))
    group(
        (len(local) if pairs else 0,), GROUP_THREADS, expert_ids, pairs, local, experts,
        source, slots, place, tiles, count, *tiling,
    )  # fmt: skip
    return RowTiles(slots, tiling, tiles, count, source), place


def _kernel(name: str, taken: int, hidden_size: int = 4, shared_bytes: int = 0) -> Kernel:
    vector = 4 if hidden_size % 4 == 0 else 1
    return load_kernel("blocks/experts", name, shared_bytes, VECTOR=vector, TAKEN=taken)
