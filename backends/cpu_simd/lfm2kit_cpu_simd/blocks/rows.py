"""The blocks that look at each row alone: embedding, norm, last rows, head."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types

from lfm2kit import specs
from lfm2kit.backend import Batch, Format, Weights
from lfm2kit_cpu_simd.compiling import kernel
from lfm2kit_cpu_simd.gemm import Float32, linear
from lfm2kit_cpu_simd.packing import pack
from lfm2kit_cpu_simd.signatures import FLOAT, ROWS, ROWS_OUT, VECTOR


class Embedding:
    """An embedding whose table stays a view of the checkpoint; rows are widened when looked up."""

    def __init__(self, spec: specs.Embedding, weights: Weights, format: Format | None) -> None:
        self.table = weights["weight"]

    def __call__(self, batch: Batch) -> Float32:
        return np.ascontiguousarray(self.table[batch.token_ids].float32())


class RMSNorm:
    def __init__(self, spec: specs.RMSNorm, weights: Weights, format: Format | None) -> None:
        self.weight = np.array(weights.float32("weight"))
        self.eps = np.float32(spec.eps)

    def __call__(self, hidden: Float32, delta: Float32 | None) -> tuple[Float32, Float32]:
        x = np.empty_like(hidden)
        if delta is None:
            hidden, delta = hidden.copy(), np.zeros((0, hidden.shape[1]), np.float32)
        _add_and_norm(hidden, delta, self.weight, self.eps, x)
        return hidden, x


class LastRows:
    def __init__(self, spec: specs.LastRows, weights: Weights, format: Format | None) -> None:
        pass

    def __call__(self, hidden: Float32, delta: Float32, batch: Batch) -> tuple[Float32, Float32]:
        return hidden[batch.logits_rows], delta[batch.logits_rows]


class LMHead:
    def __init__(self, spec: specs.LMHead, weights: Weights, format: Format | None) -> None:
        self.panels = pack([[weights["weight"]]], format)
        self.vocab_size = spec.vocab_size

    def __call__(self, x: Float32) -> Float32:
        return linear(x, self.panels, self.vocab_size)


@kernel(
    types.void(ROWS_OUT, ROWS, VECTOR, FLOAT, ROWS_OUT),
    parallel=True,
    error_model="numpy",
    fastmath={"reassoc"},  # the sum of squares in vector lanes; its order depends on nothing else
)
def _add_and_norm(hidden: Any, delta: Any, weight: Any, eps: Any, x: Any) -> None:
    """Compute hidden += delta (unless delta is empty), and x = hidden / rms(hidden) * weight."""
    for row in numba.prange(hidden.shape[0]):
        if delta.shape[0]:
            for j in range(hidden.shape[1]):
                hidden[row, j] += delta[row, j]
        squares = np.float32(0)
        for j in range(hidden.shape[1]):
            squares += hidden[row, j] * hidden[row, j]
        scale = np.float32(1) / np.sqrt(squares / np.float32(hidden.shape[1]) + eps)
        if not squares < np.float32(np.inf):  # else 1 / inf would hide it
            scale = np.float32(np.nan)
        for j in range(hidden.shape[1]):
            x[row, j] = hidden[row, j] * scale * weight[j]
