"""Causal grouped-query attention with normed, rotated queries and keys."""

from __future__ import annotations

from typing import Any, NamedTuple

import cupy
import numpy as np

from lfm2kit import specs
from lfm2kit.backend import Batch, Room, Tensor, Weights
from lfm2kit_cuda.constants import ATTENTION
from lfm2kit_cuda.device import most_shared_bytes, sm_count
from lfm2kit_cuda.kernels import load_kernel
from lfm2kit_cuda.launching import in_layers
from lfm2kit_cuda.paging import keys_shape
from lfm2kit_cuda.parts import arrived_shape, ctas_of_row, layout, parts_of, parts_shape
from lfm2kit_cuda.products import Activations, Arithmetic, readable
from lfm2kit_cuda.upload import upload

ROTATE_THREADS, ATTEND_THREADS = 256, ATTENTION.ATTEND_THREADS


class State(NamedTuple):
    """What an attention keeps of sequences, and where CTAs share the work on long contexts."""

    keys: cupy.ndarray  # [pages, page_tokens, kv_heads, head_dim]
    values: cupy.ndarray
    parts: cupy.ndarray  # [parts, heads, head_dim + 2], float32: sums of parts of contexts
    arrived: cupy.ndarray  # [parts, kv_heads], int32: CTAs that are done; 0 between launches


class Attention:
    def __init__(self, spec: specs.Attention, weights: Weights, gemm: Arithmetic) -> None:
        self.spec = spec
        self.gemm = gemm
        self.dtype = np.dtype(np.float32 if gemm.activation == "F32" else np.uint16)
        self.qkv_proj = gemm.pack([_stacked([weights[f"{n}_proj.weight"] for n in "qkv"])])
        self.out_proj = gemm.pack([weights["out_proj.weight"]])
        self.q_layernorm = upload(weights.float32("q_layernorm.weight"))
        self.k_layernorm = upload(weights.float32("k_layernorm.weight"))
        # As transformers computes them: at position 1000 the rounding of the angles shows.
        exponents = np.arange(0, spec.head_dim, 2, dtype=np.float32) / np.float32(spec.head_dim)
        self.inverse = upload((1 / np.float32(spec.rope_theta) ** exponents).astype(np.float32))
        heads, kv_heads = spec.num_attention_heads, spec.num_key_value_heads
        self.rows = max(1, ATTENTION.MOST_ROWS * kv_heads // heads)
        constants: dict[str, int | str] = {
            "HEADS": heads, "KV_HEADS": kv_heads, "HEAD_DIM": spec.head_dim,
            "INNER": gemm.activation,
        }  # fmt: skip
        self.norm_and_rotate = load_kernel("blocks/rotation", "norm_and_rotate", 0, **constants)
        sizes = layout(spec, self.dtype.itemsize, most_shared_bytes())
        self.attend, self.attend_parts = (
            load_kernel("blocks/attention", name, shared_bytes, **constants, **sizes._asdict())
            for name, shared_bytes in (
                ("attend", sizes.WHOLE_BYTES),
                ("attend_parts", sizes.PARTS_BYTES),
            )
        )

    def __call__(self, x: cupy.ndarray, batch: Batch, state: State | None) -> cupy.ndarray:
        return self.of(Activations(x, self.gemm.rounded(x)), batch, state)

    def of(self, inputs: Activations, batch: Batch, state: State | None) -> cupy.ndarray:
        """Do what a call does, with an input that is rounded already."""
        qkv = self.gemm.linear_rounded(inputs.rounded, self.qkv_proj)
        return self.gemm.linear(self.between(qkv, batch, state), self.out_proj)

    def between(self, qkv: cupy.ndarray, batch: Batch, state: State | None) -> Any:
        """Return the heads of a batch, as the last product reads them; change `qkv` on the way."""
        s, of_sequences = self.spec, (batch.positions, batch.cu_seqlens, batch.pages)
        keys, values = (state.keys, state.values) if state else (None, None)
        table = batch.sequences, batch.pages.shape[1], 0 if keys is None else keys.shape[1]
        warps = s.num_attention_heads + 2 * s.num_key_value_heads  # for each row
        self.norm_and_rotate(
            (batch.tokens, -(-32 * warps // ROTATE_THREADS)), ROTATE_THREADS, qkv,
            self.q_layernorm, self.k_layernorm, self.inverse, *of_sequences, keys, values, *table,
            s.norm_eps,
        )  # fmt: skip
        heads = self.gemm.empty(batch.tokens, s.num_attention_heads * s.head_dim)
        given, kv_heads = (qkv, keys, values, *of_sequences), s.num_key_value_heads
        to, scale = (heads.array, heads.extent, *table), s.head_dim**-0.5
        parts = parts_of(batch, table[-1], len(state.parts)) if state else 0
        if state and parts:
            grid = batch.tokens, ctas_of_row(batch, kv_heads, parts, sm_count()), kv_heads
            shared = state.parts, state.arrived
            self.attend_parts(grid, ATTEND_THREADS, *given, *shared, *to, parts, scale)
        else:
            y, layers = in_layers(batch.sequences)
            grid = -(-batch.max_seqlen // self.rows), y, layers * kv_heads
            self.attend(grid, ATTEND_THREADS, *given, *to, scale)
        return heads

    def new_state(self, room: Room) -> State:
        spec, shape = self.spec, keys_shape(self.spec, room)
        keys, values = cupy.empty(shape, self.dtype), cupy.empty(shape, self.dtype)
        parts = cupy.empty(parts_shape(spec, room), np.float32)
        return State(keys, values, parts, cupy.zeros(arrived_shape(spec, room), np.int32))


def _stacked(matrices: list[Tensor]) -> Tensor:
    """Return one matrix of all rows, in the format of the matrices if they share one, or in F32."""
    name, matrices = ", ".join(m.name for m in matrices), [readable(m) for m in matrices]
    if len({matrix.format for matrix in matrices}) == 1:
        stacked = np.concatenate([m.data for m in matrices])
        return Tensor.of_array(name, stacked, matrices[0].format)
    return Tensor.of_array(name, np.concatenate([m.float32() for m in matrices]))
