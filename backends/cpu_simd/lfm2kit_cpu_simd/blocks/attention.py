"""Causal grouped-query attention: projections, rotary embedding, and keys and values in pages."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types

from lfm2kit import specs
from lfm2kit.backend import Batch, Format, Room, Weights
from lfm2kit_cpu_simd.blocks.paged_attention import State, attend, remember, whole_sequences
from lfm2kit_cpu_simd.compiling import kernel
from lfm2kit_cpu_simd.gemm import Float32, linear
from lfm2kit_cpu_simd.packing import pack
from lfm2kit_cpu_simd.signatures import FLOAT, IDS, INT, ROWS_OUT, VECTOR


class Attention:
    def __init__(self, spec: specs.Attention, weights: Weights, format: Format | None) -> None:
        self.spec = spec
        names = ("q_proj", "k_proj", "v_proj")
        self.qkv_proj = pack([[weights[f"{name}.weight"] for name in names]], format)
        self.out_proj = pack([[weights["out_proj.weight"]]], format)
        self.q_layernorm = np.array(weights.float32("q_layernorm.weight"))
        self.k_layernorm = np.array(weights.float32("k_layernorm.weight"))
        # As transformers computes them: at position 1000 the rounding of the angles shows.
        exponents = np.arange(0, spec.head_dim, 2, dtype=np.float32) / np.float32(spec.head_dim)
        self.inverse = (1 / np.float32(spec.rope_theta) ** exponents).astype(np.float32)

    def __call__(self, x: Float32, batch: Batch, state: State | None) -> Float32:
        s = self.spec
        heads, kv_heads = s.num_attention_heads, s.num_key_value_heads
        columns = (heads + 2 * kv_heads) * s.head_dim
        qkv = linear(x, self.qkv_proj, columns, buffer="projected")
        _norm_and_rotate(qkv, self.q_layernorm, self.k_layernorm, np.float32(s.norm_eps),
                         self.inverse, batch.positions, heads, kv_heads)  # fmt: skip
        if state is None:
            state, first_panels = whole_sequences(s, batch.cu_seqlens)
        else:
            first_panels = state.first_panels(batch.pages)
        remember(qkv, batch, state, first_panels)
        return linear(attend(qkv, batch, state, first_panels, s), self.out_proj, s.hidden_size)

    def new_state(self, room: Room) -> State:
        return State.of_room(self.spec, room)


@kernel(
    types.void(ROWS_OUT, VECTOR, VECTOR, FLOAT, VECTOR, IDS, INT, INT),
    parallel=True,
    error_model="numpy",
    fastmath={"reassoc"},  # the sum of squares in vector lanes
)
def _norm_and_rotate(
    qkv: Any,
    q_weight: Any,
    k_weight: Any,
    eps: Any,
    inverse: Any,
    positions: Any,
    heads: Any,
    kv_heads: Any,
) -> None:
    """Apply RMSNorm to each head of q and k, then RoPE by halves, in place."""
    head_dim, half = q_weight.shape[0], inverse.shape[0]
    for row in numba.prange(qkv.shape[0]):
        cos, sin = np.empty(half, np.float32), np.empty(half, np.float32)
        for i in range(half):
            angle = np.float32(positions[row]) * inverse[i]
            cos[i], sin[i] = np.cos(angle), np.sin(angle)
        for head in range(heads + kv_heads):
            weight = q_weight if head < heads else k_weight
            at = head * head_dim
            squares = np.float32(0)
            for i in range(head_dim):
                squares += qkv[row, at + i] * qkv[row, at + i]
            scale = np.float32(1) / np.sqrt(squares / np.float32(head_dim) + eps)
            if not squares < np.float32(np.inf):  # else 1 / inf would hide it
                scale = np.float32(np.nan)
            for i in range(half):
                a = qkv[row, at + i] * scale * weight[i]
                b = qkv[row, at + half + i] * scale * weight[half + i]
                qkv[row, at + i] = a * cos[i] - b * sin[i]
                qkv[row, at + half + i] = b * cos[i] + a * sin[i]
