"""Causal grouped-query attention: rows share out, each with its heads and its context."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import types

from lfm2kit import specs
from lfm2kit.backend import Batch, Weights
from lfm2kit_cpu_simd.elementwise import exp
from lfm2kit_cpu_simd.gemm import Float32, linear
from lfm2kit_cpu_simd.packing import pack
from lfm2kit_cpu_simd.signatures import FLOAT, IDS, INT, OFFSETS, ROWS, ROWS_OUT, VECTOR

State = tuple[Float32, Float32]  # keys, values: [slots, max_tokens, kv_heads * head_dim]


class Attention:
    def __init__(self, spec: specs.Attention, weights: Weights) -> None:
        self.spec = spec
        names = ("q_proj", "k_proj", "v_proj")
        self.qkv_proj = pack([[weights[f"{name}.weight"] for name in names]])
        self.out_proj = pack([[weights["out_proj.weight"]]])
        self.q_layernorm = np.array(weights.float32("q_layernorm.weight"))
        self.k_layernorm = np.array(weights.float32("k_layernorm.weight"))
        # As transformers computes them: at position 1000 the rounding of the angles shows.
        exponents = np.arange(0, spec.head_dim, 2, dtype=np.float32) / np.float32(spec.head_dim)
        self.inverse = (1 / np.float32(spec.rope_theta) ** exponents).astype(np.float32)

    def __call__(self, x: Float32, batch: Batch, state: State | None) -> Float32:
        s = self.spec
        q_size = s.num_attention_heads * s.head_dim
        kv_size = s.num_key_value_heads * s.head_dim
        qkv = linear(x, self.qkv_proj, q_size + 2 * kv_size)
        eps = np.float32(s.norm_eps)
        _norm_and_rotate(qkv, 0, self.q_layernorm, eps, self.inverse, batch.positions, q_size)
        _norm_and_rotate(qkv, q_size, self.k_layernorm, eps, self.inverse, batch.positions, kv_size)
        new_keys, new_values = qkv[:, q_size : q_size + kv_size], qkv[:, q_size + kv_size :]
        if state is None:
            first = batch.cu_seqlens[:-1]
            keys, values = new_keys.copy(), new_values.copy()
        else:
            first = batch.state_slots * np.int32(state[0].shape[1])
            keys, values = (cache.reshape(-1, kv_size) for cache in state)
            rows = _of_each_row(first, batch) + batch.positions
            keys[rows], values[rows] = new_keys, new_values
        heads = np.empty((len(x), q_size), np.float32)
        scale = np.float32(s.head_dim**-0.5)
        context = _of_each_row(first, batch)
        threads = numba.get_num_threads()
        _attend(qkv, keys, values, context, batch.positions, s.head_dim, scale, heads, threads)
        return linear(heads, self.out_proj, s.hidden_size)

    def new_state(self, slots: int, max_tokens: int) -> State:
        shape = (slots, max_tokens, self.spec.num_key_value_heads * self.spec.head_dim)
        return np.empty(shape, np.float32), np.empty(shape, np.float32)

    def state_bytes(self, slots: int, max_tokens: int) -> int:
        return 8 * slots * max_tokens * self.spec.num_key_value_heads * self.spec.head_dim


def _of_each_row(of_each_sequence: Any, batch: Batch) -> npt.NDArray[np.int64]:
    return np.repeat(of_each_sequence.astype(np.int64), np.diff(batch.cu_seqlens))


@numba.njit(
    types.void(ROWS_OUT, INT, VECTOR, FLOAT, VECTOR, IDS, INT),
    parallel=True,
    cache=True,
    error_model="numpy",
)
def _norm_and_rotate(
    qkv: Any, start: Any, weight: Any, eps: Any, inverse: Any, positions: Any, size: Any
) -> None:
    """RMSNorm of each head of columns start to start + size, then RoPE by halves, in place."""
    head_dim, half = weight.shape[0], inverse.shape[0]
    for row in numba.prange(qkv.shape[0]):
        cos, sin = np.empty(half, np.float32), np.empty(half, np.float32)
        for i in range(half):
            angle = np.float32(positions[row]) * inverse[i]
            cos[i], sin[i] = np.cos(angle), np.sin(angle)
        for at in range(start, start + size, head_dim):
            squares = np.float32(0)
            for i in range(head_dim):
                squares += qkv[row, at + i] * qkv[row, at + i]
            scale = np.float32(1) / np.sqrt(squares / np.float32(head_dim) + eps)
            for i in range(half):
                a = qkv[row, at + i] * scale * weight[i]
                b = qkv[row, at + half + i] * scale * weight[half + i]
                qkv[row, at + i] = a * cos[i] - b * sin[i]
                qkv[row, at + half + i] = b * cos[i] + a * sin[i]


@numba.njit(
    types.void(ROWS, ROWS, ROWS, OFFSETS, IDS, INT, FLOAT, ROWS_OUT, INT),
    parallel=True,
    cache=True,
    error_model="numpy",
    fastmath={"reassoc", "contract"},  # dot products in vector lanes
)
def _attend(
    q: Any,
    keys: Any,
    values: Any,
    first: Any,
    positions: Any,
    head_dim: Any,
    scale: Any,
    out: Any,
    threads: Any,
) -> None:
    """Row t sees the keys first[t] to first[t] + positions[t], in this order whatever the batch.

    The first columns of q are the queries; query heads share key heads in groups.
    """
    heads = out.shape[1] // head_dim
    group = heads * head_dim // keys.shape[1]
    for thread in numba.prange(threads):
        for t in range(thread, q.shape[0], threads):  # in turns: later rows have more to see
            seen = positions[t] + 1
            scores = np.empty(seen, np.float32)
            for head in range(heads):
                at, kv_at = head * head_dim, head // group * head_dim
                most = np.float32(-np.inf)
                for j in range(seen):
                    dot = np.float32(0)
                    for d in range(head_dim):
                        dot += q[t, at + d] * keys[first[t] + j, kv_at + d]
                    scores[j] = dot * scale
                    most = max(most, scores[j])
                total = np.float32(0)
                for j in range(seen):
                    scores[j] = exp(scores[j] - most)
                    total += scores[j]
                for d in range(head_dim):
                    out[t, at + d] = np.float32(0)
                for j in range(seen):
                    weight = scores[j] / total
                    for d in range(head_dim):
                        out[t, at + d] += weight * values[first[t] + j, kv_at + d]
