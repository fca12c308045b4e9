"""The router, in float32 whatever the precision."""

from __future__ import annotations

import cupy
import numpy as np
import numpy.typing as npt

from lfm2kit import specs
from lfm2kit.backend import Weights
from lfm2kit_cuda.kernels import load_kernel
from lfm2kit_cuda.products import Arithmetic, padded
from lfm2kit_cuda.upload import upload

# As in router.cu.
SPLITS, WARPS, ROWS, CHOOSING_ROWS, PANEL, MOST_STEP = 16, 4, 16, 8, 32, 64


class Router:
    def __init__(self, spec: specs.Router, weights: Weights, gemm: Arithmetic) -> None:
        self.spec = spec
        self.gate = upload(_panels(weights.float32("gate.weight")))
        self.bias = upload(weights.float32("expert_bias")) if spec.use_expert_bias else None
        constants = {
            "HIDDEN": spec.hidden_size,
            "VECTOR": 4 if spec.hidden_size % 4 == 0 else 1,
            "EXPERTS": spec.num_experts,
            "TAKEN": spec.num_experts_per_tok,
        }
        self.logits = load_kernel("blocks/router", "logits", **constants)
        self.choose = load_kernel("blocks/router", "choose", **constants)

    def __call__(self, x: cupy.ndarray) -> tuple[cupy.ndarray, cupy.ndarray]:
        s, tokens = self.spec, len(x)
        sums = cupy.empty((SPLITS, tokens, s.num_experts), cupy.float32)
        self.logits(
            (-(-tokens // ROWS), SPLITS, len(self.gate)), 32 * WARPS, x, self.gate, sums, tokens
        )
        shape = (tokens, s.num_experts_per_tok)
        ids, weights = cupy.empty(shape, cupy.int32), cupy.empty(shape, cupy.float32)
        self.choose(
            (-(-tokens // CHOOSING_ROWS),), 32 * CHOOSING_ROWS, sums, self.bias, ids, weights,
            tokens, s.norm_topk_prob, s.routed_scaling_factor,
        )  # fmt: skip
        return ids, weights


def _panels(gate: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """[panels, k, PANEL] of [experts, h]: padded with zeros to whole panels and pieces of k."""
    experts, h = gate.shape
    piece = padded(h, SPLITS * WARPS * 4) // (SPLITS * WARPS)
    rows = SPLITS * WARPS * padded(piece, min(piece, MOST_STEP))
    panels = np.zeros((padded(experts, PANEL), rows), np.float32)
    panels[:experts, :h] = gate
    return np.ascontiguousarray(panels.reshape(-1, PANEL, rows).transpose(0, 2, 1))
