"""The router and its two parts, in float32 whatever the precision."""

from __future__ import annotations

import cupy
import numpy as np
import numpy.typing as npt

from lfm2kit import specs
from lfm2kit.backend import Block, Weights
from lfm2kit_cuda.constants import ROUTER
from lfm2kit_cuda.kernels import Kernel, load_kernel
from lfm2kit_cuda.products import Arithmetic, padded
from lfm2kit_cuda.upload import upload

SPLITS, WARPS, PANEL, CHOOSING_ROWS = (
    ROUTER.SPLITS, ROUTER.WARPS, ROUTER.PANEL, ROUTER.CHOOSING_ROWS,
)  # fmt: skip

Routing = tuple[cupy.ndarray, cupy.ndarray]  # expert_ids, expert_weights


class Scores:
    def __init__(self, spec: specs.Scores, weights: Weights, gemm: Arithmetic) -> None:
        self.spec = spec
        self.gate = upload(_panels(weights.float32("gate.weight")))
        self.logits = _kernel("logits", spec.num_experts, hidden_size=spec.hidden_size)
        self.score = _kernel("score", spec.num_experts, hidden_size=spec.hidden_size)

    def __call__(self, x: cupy.ndarray) -> cupy.ndarray:
        scores = cupy.empty((len(x), self.spec.num_experts), cupy.float32)
        grid = -(-len(x) // CHOOSING_ROWS), len(self.gate)
        self.score(grid, 32 * CHOOSING_ROWS, self.sums(x), scores, len(x))
        return scores

    def sums(self, x: cupy.ndarray) -> cupy.ndarray:
        """Return [SPLITS, tokens, num_experts], whose sum over the first axis is the logits."""
        sums = cupy.empty((SPLITS, len(x), self.spec.num_experts), cupy.float32)
        grid = -(-len(x) // ROUTER.ROWS), SPLITS, len(self.gate)
        self.logits(grid, 32 * WARPS, x, self.gate, sums, len(x))
        return sums


class Choice:
    def __init__(self, spec: specs.Choice, weights: Weights, gemm: Arithmetic) -> None:
        self.spec = spec
        self.bias = upload(weights.float32("expert_bias")) if spec.use_expert_bias else None
        kernels = (
            _kernel(name, spec.num_experts, taken=spec.num_experts_per_tok)
            for name in ("choose", "choose_by_sums")
        )
        self.choose, self.choose_by_sums = kernels

    def __call__(self, scores: cupy.ndarray) -> Routing:
        return self._call(self.choose, scores, len(scores))

    def by_sums(self, sums: cupy.ndarray) -> Routing:
        """Do what a call does, with what `Scores.sums` returned."""
        return self._call(self.choose_by_sums, sums, sums.shape[1])

    def empty(self, tokens: int) -> Routing:
        """Return arrays for the choice of `tokens` tokens."""
        shape = tokens, self.spec.num_experts_per_tok
        return cupy.empty(shape, cupy.int32), cupy.empty(shape, cupy.float32)

    def _call(self, kernel: Kernel, given: cupy.ndarray, tokens: int) -> Routing:
        s, routing = self.spec, self.empty(tokens)
        kernel(
            (-(-tokens // CHOOSING_ROWS),), 32 * CHOOSING_ROWS, given, self.bias, *routing,
            tokens, s.norm_topk_prob, s.routed_scaling_factor,
        )  # fmt: skip
        return routing


class Router:
    """A router, which gives its scores to a `choice` that lies elsewhere, if given one."""

    def __init__(
        self,
        spec: specs.Router,
        weights: Weights,
        gemm: Arithmetic,
        choice: Block | None = None,
    ) -> None:
        self.scores = Scores(spec.scores, weights, gemm)
        self.choice: Block = choice or Choice(spec.choice, weights, gemm)

    def __call__(self, x: cupy.ndarray) -> Routing:
        if isinstance(self.choice, Choice):
            return self.choice.by_sums(self.scores.sums(x))
        expert_ids, expert_weights = self.choice(self.scores(x))
        return expert_ids, expert_weights


def _kernel(name: str, experts: int, hidden_size: int = 4, taken: int = 1) -> Kernel:
    constants = {
        "HIDDEN": hidden_size,
        "VECTOR": 4 if hidden_size % 4 == 0 else 1,
        "EXPERTS": experts,
        "TAKEN": taken,
    }
    return load_kernel("blocks/router", name, **constants)


def _panels(gate: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return [experts, h] as [panels, k, PANEL]: zeros pad it to whole panels and pieces of k."""
    experts, h = gate.shape
    piece = padded(h, SPLITS * WARPS * 4) // (SPLITS * WARPS)
    rows = SPLITS * WARPS * padded(piece, min(piece, ROUTER.MOST_STEP))
    panels = np.zeros((padded(experts, PANEL), rows), np.float32)
    panels[:experts, :h] = gate
    return np.ascontiguousarray(panels.reshape(-1, PANEL, rows).transpose(0, 2, 1))
