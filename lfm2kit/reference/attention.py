"""Causal grouped-query attention with normed, rotated queries and keys."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lfm2kit import specs
from lfm2kit.backend import Batch, Weights
from lfm2kit.reference.linear import Float32, Float64, linear, rms_norm

State = tuple[Float64, Float64]  # keys and values, each [slots, max_tokens, kv_heads, head_dim]


class Attention:
    def __init__(self, spec: specs.Attention, weights: Weights) -> None:
        self.spec = spec
        self.weights = weights

    def __call__(self, x: Float32, batch: Batch, state: State | None) -> Float32:
        q = self._rotated(self._heads(x, "q"), "q", batch.positions)
        k = self._rotated(self._heads(x, "k"), "k", batch.positions)
        v = self._heads(x, "v")
        heads = np.empty_like(q)
        for i, slot in enumerate(batch.state_slots):
            rows = slice(batch.cu_seqlens[i], batch.cu_seqlens[i + 1])
            keys, values = self._context(k[rows], v[rows], state, slot, batch.positions[rows.start])
            heads[rows] = self._attend(q[rows], keys, values)
        flat = heads.reshape(len(x), self.spec.num_attention_heads * self.spec.head_dim)
        return linear(flat, self.weights["out_proj.weight"]).astype(np.float32)

    def new_state(self, slots: int, max_tokens: int) -> State:
        shape = (slots, max_tokens, self.spec.num_key_value_heads, self.spec.head_dim)
        return np.empty(shape), np.empty(shape)

    def state_bytes(self, slots: int, max_tokens: int) -> int:
        return 2 * slots * max_tokens * self.spec.num_key_value_heads * self.spec.head_dim * 8

    def _heads(self, x: Float32, name: str) -> Float64:
        """[tokens, heads, head_dim]"""
        y = linear(x, self.weights[f"{name}_proj.weight"])
        return y.reshape(len(x), y.shape[1] // self.spec.head_dim, self.spec.head_dim)

    def _rotated(self, heads: Float64, name: str, positions: npt.NDArray[np.int32]) -> Float64:
        """Norm over head_dim first, then RoPE: (a, b) -> (a cos - b sin, b cos + a sin), by halves.

        The angles are float32, as in transformers: at position 1000 their rounding shows.
        """
        heads = rms_norm(heads, self.weights[f"{name}_layernorm.weight"], self.spec.norm_eps)
        exponents = np.arange(0, self.spec.head_dim, 2, dtype=np.float32) / self.spec.head_dim
        inverse = (1 / np.float32(self.spec.rope_theta) ** exponents).astype(np.float32)
        angles = positions.astype(np.float32)[:, None, None] * inverse
        cos, sin = np.cos(angles, dtype=np.float64), np.sin(angles, dtype=np.float64)
        a, b = np.split(heads, 2, axis=2)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=2)

    def _context(
        self, k: Float64, v: Float64, state: State | None, slot: int, start: int
    ) -> tuple[Float64, Float64]:
        """The keys and values that the sequence may see: its past, then its new rows."""
        if state is None:
            return k, v
        end = start + len(k)
        for cache, new in zip(state, (k, v), strict=True):
            cache[slot, start:end] = new
        return state[0][slot, :end], state[1][slot, :end]

    def _attend(self, q: Float64, k: Float64, v: Float64) -> Float64:
        """q [tokens, heads, head_dim]; k, v [context, kv_heads, head_dim]; the last rows align."""
        group = self.spec.num_attention_heads // self.spec.num_key_value_heads
        k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) * self.spec.head_dim**-0.5
        future = np.triu(np.ones(scores.shape[1:], dtype=bool), k=len(k) - len(q) + 1)
        scores[:, future] = -np.inf
        weights = np.exp(scores - scores.max(axis=2, keepdims=True))
        weights /= weights.sum(axis=2, keepdims=True)
        return self._weighed(weights, v, ~future)

    def _weighed(self, weights: Float64, v: Float64, is_seen: npt.NDArray[np.bool_]) -> Float64:
        """The sums of the values by weight, NaN where a row sees one that is not finite.

        A weight of 0 would not hide it from the rows before: 0 * NaN is NaN.
        """
        is_finite = np.isfinite(v)
        heads = np.asarray(np.einsum("hqk,khd->qhd", weights, np.where(is_finite, v, 0)))
        if not is_finite.all():
            heads[np.einsum("qk,khd->qhd", is_seen, ~is_finite)] = np.nan
        return heads
