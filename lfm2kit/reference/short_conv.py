"""ShortConv: a gated causal convolution over a few tokens of the same sequence."""

from __future__ import annotations

import numpy as np

from lfm2kit import specs
from lfm2kit.backend import Batch, Weights
from lfm2kit.reference.linear import Float32, Float64, float64, linear


class ShortConv:
    def __init__(self, spec: specs.ShortConv, weights: Weights) -> None:
        self.spec = spec
        self.weights = weights
        self.taps = float64(weights["conv.weight"])[:, 0, :].T  # [kernel_size, hidden_size]

    def __call__(self, x: Float32, batch: Batch, state: Float64 | None) -> Float32:
        B, C, X = np.split(self._linear(x, "in_proj"), 3, axis=1)
        u = B * X
        y = np.empty_like(u)
        for i, slot in enumerate(batch.state_slots):
            rows = slice(batch.cu_seqlens[i], batch.cu_seqlens[i + 1])
            past = self._past(state, slot, batch.positions[rows.start])
            y[rows] = self._convolve(np.concatenate([past, u[rows]]))
            if state is not None:
                state[slot] = np.concatenate([past, u[rows]])[len(u[rows]) :]
        return self._linear(C * y, "out_proj").astype(np.float32)

    def new_state(self, slots: int, max_tokens: int) -> Float64:
        """The last kernel_size - 1 rows of u of each slot."""
        return np.empty((slots, self.spec.kernel_size - 1, self.spec.hidden_size))

    def state_bytes(self, slots: int, max_tokens: int) -> int:
        return slots * (self.spec.kernel_size - 1) * self.spec.hidden_size * 8

    def _past(self, state: Float64 | None, slot: int, position: int) -> Float64:
        """The rows of u before `position`; those before the sequence's start are zero."""
        past = np.zeros((self.spec.kernel_size - 1, self.spec.hidden_size))
        seen = min(int(position), len(past))
        if state is not None and seen:
            past[-seen:] = state[slot, -seen:]
        return past

    def _convolve(self, u: Float64) -> Float64:
        """[kernel_size - 1 + tokens, hidden_size] -> [tokens, hidden_size]."""
        tokens = len(u) - self.spec.kernel_size + 1
        y = sum(tap * u[j : j + tokens] for j, tap in enumerate(self.taps))
        return y + float64(self.weights["conv.bias"]) if self.spec.bias else np.asarray(y)

    def _linear(self, x: Float32 | Float64, name: str) -> Float64:
        bias = self.weights[f"{name}.bias"] if self.spec.bias else None
        return linear(x, self.weights[f"{name}.weight"], bias)
