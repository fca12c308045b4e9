"""MLP, experts and the sparse MoE: grouped products over rows sorted by expert on the device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import cupy
import numpy as np

from lfm2kit import specs
from lfm2kit.backend import Block, Weights
from lfm2kit_cuda.blocks.grouping import (
    Groups,
    are_grouped_at_once,
    chosen_and_grouped,
    grouped_by_expert,
)
from lfm2kit_cuda.blocks.router import Choice, Router
from lfm2kit_cuda.constants import EXPERTS
from lfm2kit_cuda.kernels import Kernel, load_kernel
from lfm2kit_cuda.products import Activations, Arithmetic, Matrix
from lfm2kit_cuda.upload import upload

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
        self._prepare(spec, gemm)
        w1, w3, w2 = (
            [weights[f"experts.{e}.{name}.weight"] for e in spec.local_experts]
            for name in ("w1", "w3", "w2")
        )
        if spec.local_experts:
            self.w13, self.w2 = gemm.pack_gated(w1, w3), gemm.pack_down(w2)

    def _prepare(self, spec: specs.Experts, gemm: Arithmetic) -> None:
        self.spec = spec
        self.gemm = gemm
        self.local = upload(np.array(spec.local_experts, np.int32))

    def matrices(self) -> AbstractContextManager[tuple[Matrix, Matrix]]:
        """Return a context in which work that multiplies with the matrices is enqueued."""
        return nullcontext((self.w13, self.w2))

    def __call__(
        self, x: cupy.ndarray, expert_ids: cupy.ndarray, expert_weights: cupy.ndarray
    ) -> cupy.ndarray:
        return self.of(self.gemm.rounded(x), expert_ids, expert_weights)

    def of(
        self, rounded: Any, expert_ids: cupy.ndarray, expert_weights: cupy.ndarray
    ) -> cupy.ndarray:
        """Do what a call does, with an input that is rounded already."""
        s = self.spec
        if not s.local_experts:  # no pair is of a local expert
            return cupy.zeros((len(expert_ids), s.hidden_size), cupy.float32)
        groups = grouped_by_expert(expert_ids, self.local, s.num_experts, self.gemm)
        return self.of_groups(rounded, groups, expert_weights)

    def of_groups(self, rounded: Any, groups: Groups, expert_weights: cupy.ndarray) -> cupy.ndarray:
        """Do what `of` does, with pairs that are grouped already."""
        h, (tokens, taken), (tiles, place) = self.spec.hidden_size, expert_weights.shape, groups
        with self.matrices() as (w13, w2):
            outputs = self.gemm.down(self.gemm.gated(rounded, w13, tiles), w2, tiles)
        delta = cupy.empty((tokens, h), cupy.float32)
        combine = _combine(taken, h, outputs.dtype)
        combine((tokens,), EXPERTS.COMBINE_THREADS, outputs, place, expert_weights, delta, h)
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
        self.spec = spec
        self.gemm = gemm
        self.router = Router(spec.router, weights, gemm, choice)
        self.experts = Experts(spec.experts, weights, gemm)
        self._passed: Callable[[str], None] = unheard

    def tell_parts(self, passed: Callable[[str], None] | None) -> None:
        self._passed = passed or unheard

    def __call__(self, x: cupy.ndarray) -> cupy.ndarray:
        return self.of(Activations(x, self.gemm.rounded(x)))

    def of(self, inputs: Activations) -> cupy.ndarray:
        """Do what a call does, with an input that is rounded already."""
        x, choice = inputs.x, self.router.choice
        assert x is not None
        if not (isinstance(choice, Choice) and are_grouped_at_once(self.spec, len(x))):
            chosen = self.router(x)
            self._passed("router")
            delta = self.experts.of(inputs.rounded, *chosen)
        else:
            (_, expert_weights), groups = chosen_and_grouped(
                choice, x, self.router.scores.sums(x), self.experts.local, self.gemm
            )
            self._passed("router")
            delta = self.experts.of_groups(inputs.rounded, groups, expert_weights)
        self._passed("experts")
        return delta


def unheard(part: str) -> None:
    """Be told of a part by a block whose parts nobody wants to hear of."""


def _combine(taken: int, hidden_size: int, dtype: np.dtype[Any]) -> Kernel:
    vector = 4 if hidden_size % 4 == 0 else 1
    name = f"combine_{COMBINED[dtype.type]}"
    return load_kernel("blocks/experts", name, VECTOR=vector, TAKEN=taken)
