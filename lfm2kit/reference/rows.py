"""The blocks that look at each row alone: embedding, norm, last rows, head."""

from __future__ import annotations

import numpy as np

from lfm2kit import specs
from lfm2kit.backend import PADDING, Batch, Weights
from lfm2kit.reference.linear import Float32, float64, linear, rms_norm


class Embedding:
    def __init__(self, spec: specs.Embedding, weights: Weights) -> None:
        self.weight = weights["weight"]

    def __call__(self, batch: Batch) -> Float32:
        is_padding = batch.positions == PADDING  # such a row's id means nothing
        hidden = np.array(self.weight[np.where(is_padding, 0, batch.token_ids)].float32())
        hidden[is_padding] = 0
        return hidden


class RMSNorm:
    def __init__(self, spec: specs.RMSNorm, weights: Weights) -> None:
        self.weight = weights["weight"]
        self.eps = spec.eps

    def __call__(self, hidden: Float32, delta: Float32 | None) -> tuple[Float32, Float32]:
        hidden = hidden if delta is None else hidden + delta
        return hidden, rms_norm(float64(hidden), self.weight, self.eps).astype(np.float32)


class LastRows:
    def __init__(self, spec: specs.LastRows, weights: Weights) -> None:
        pass

    def __call__(self, hidden: Float32, delta: Float32, batch: Batch) -> tuple[Float32, Float32]:
        return hidden[batch.logits_rows], delta[batch.logits_rows]


class LMHead:
    def __init__(self, spec: specs.LMHead, weights: Weights) -> None:
        self.weight = weights["weight"]

    def __call__(self, x: Float32) -> Float32:
        return linear(x, self.weight).astype(np.float32)
