"""The router, in float32 whatever the precision."""

from __future__ import annotations

import cupy
import numpy as np

from lfm2kit import specs
from lfm2kit.backend import Weights
from lfm2kit_cuda.kernels import load_kernel
from lfm2kit_cuda.products import Arithmetic
from lfm2kit_cuda.upload import upload

ROWS, WARPS, THREADS = 8, 16, 512  # of a block, as in router.cu


class Router:
    def __init__(self, spec: specs.Router, weights: Weights, gemm: Arithmetic) -> None:
        self.spec = spec
        self.gate = upload(np.ascontiguousarray(weights.float32("gate.weight").T))
        self.bias = upload(weights.float32("expert_bias")) if spec.use_expert_bias else None
        self.kernel = load_kernel(
            "blocks/router",
            "route",
            shared_bytes=4 * WARPS * ROWS * spec.num_experts,
            EXPERTS=spec.num_experts,
            TAKEN=spec.num_experts_per_tok,
        )

    def __call__(self, x: cupy.ndarray) -> tuple[cupy.ndarray, cupy.ndarray]:
        s, shape = self.spec, (len(x), self.spec.num_experts_per_tok)
        ids, weights = cupy.empty(shape, cupy.int32), cupy.empty(shape, cupy.float32)
        self.kernel(
            (-(-len(x) // ROWS),), THREADS, x, self.gate, self.bias, ids, weights,
            len(x), s.hidden_size, s.norm_topk_prob, s.routed_scaling_factor,
        )  # fmt: skip
        return ids, weights
