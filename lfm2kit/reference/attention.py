"""Causal grouped-query attention with normed, rotated queries and keys."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lfm2kit import specs
from lfm2kit.backend import PADDING, Batch, Room, Weights
from lfm2kit.reference.linear import Float32, Float64, linear, rms_norm


class State(NamedTuple):
    keys: Float64  # [pages, page_tokens, kv_heads, head_dim]
    values: Float64


class Attention:
    def __init__(self, spec: specs.Attention, weights: Weights) -> None:
        self.spec = spec
        self.weights = weights

    def __call__(self, x: Float32, batch: Batch, state: State | None) -> Float32:
        q = self._rotated(self._heads(x, "q"), "q", batch.positions)
        k = self._rotated(self._heads(x, "k"), "k", batch.positions)
        v = self._heads(x, "v")
        heads = np.zeros_like(q)
        for i, pages in enumerate(batch.pages):
            rows = slice(batch.cu_seqlens[i], batch.cu_seqlens[i + 1])
            positions = batch.positions[rows]
            if positions[0] == PADDING:
                continue
            keys, values = k[rows], v[rows]
            if state is not None:
                keys, values = (
                    _extended(cache, pages, positions, new)
                    for cache, new in zip(state, (keys, values), strict=True)
                )
            heads[rows] = self._attend(q[rows], keys, values)
        flat = heads.reshape(len(x), self.spec.num_attention_heads * self.spec.head_dim)
        return linear(flat, self.weights["out_proj.weight"]).astype(np.float32)

    def new_state(self, room: Room) -> State:
        shape = (room.pages, room.page_tokens, self.spec.num_key_value_heads, self.spec.head_dim)
        return State(np.empty(shape), np.empty(shape))

    def _heads(self, x: Float32, name: str) -> Float64:
        """Return the projection `name` of x as [tokens, heads, head_dim]."""
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

    def _attend(self, q: Float64, k: Float64, v: Float64) -> Float64:
        """Attend with q [tokens, heads, head_dim] to k and v [context, kv_heads, head_dim]."""
        group = self.spec.num_attention_heads // self.spec.num_key_value_heads
        k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) * self.spec.head_dim**-0.5
        future = np.triu(np.ones(scores.shape[1:], dtype=bool), k=len(k) - len(q) + 1)
        scores[:, future] = -np.inf
        weights = np.exp(scores - scores.max(axis=2, keepdims=True))
        weights /= weights.sum(axis=2, keepdims=True)
        return self._weighed(weights, v, ~future)

    def _weighed(self, weights: Float64, v: Float64, is_seen: npt.NDArray[np.bool_]) -> Float64:
        """Return the values' weighted sums, NaN where a row sees one that is not finite.

        A weight of 0 would not hide it from the rows before: 0 * NaN is NaN.
        """
        is_finite = np.isfinite(v)
        heads = np.asarray(np.einsum("hqk,khd->qhd", weights, np.where(is_finite, v, 0)))
        if not is_finite.all():
            heads[np.einsum("qk,khd->qhd", is_seen, ~is_finite)] = np.nan
        return heads


def _extended(
    cache: Float64, pages: npt.NDArray[np.int32], positions: npt.NDArray[np.int32], new: Float64
) -> Float64:
    """Put `new` rows into their pages; return all rows of the sequence, its past included."""
    page_tokens = cache.shape[1]
    cache[pages[positions // page_tokens], positions % page_tokens] = new
    end = positions[-1] + 1
    used = pages[: -(-end // page_tokens)]
    return np.concatenate(list(cache[used]))[:end]


def state_bytes(spec: specs.Attention, room: Room) -> int:
    elements = room.pages * room.page_tokens * spec.num_key_value_heads * spec.head_dim
    return 2 * 8 * elements
