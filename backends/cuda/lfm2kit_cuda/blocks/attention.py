"""Causal grouped-query attention with normed, rotated queries and keys."""

from __future__ import annotations

import cupy
import numpy as np

from lfm2kit import specs
from lfm2kit.backend import Batch, Room, Tensor, Weights
from lfm2kit_cuda.constants import ATTENTION
from lfm2kit_cuda.kernels import load_kernel
from lfm2kit_cuda.launching import in_layers
from lfm2kit_cuda.paging import keys_shape
from lfm2kit_cuda.products import Activations, Arithmetic, readable
from lfm2kit_cuda.upload import upload

SOURCE = "blocks/attention"
ROTATE_THREADS, ATTEND_THREADS = 256, ATTENTION.ATTEND_THREADS

State = tuple[cupy.ndarray, cupy.ndarray]  # keys, values: [pages, page_tokens, kv_heads, head_dim]


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
        self.norm_and_rotate, self.attend = (
            load_kernel(
                SOURCE,
                name,
                HEADS=heads,
                KV_HEADS=kv_heads,
                HEAD_DIM=spec.head_dim,
                INNER=gemm.activation,
            )
            for name in ("norm_and_rotate", "attend")
        )

    def __call__(self, x: cupy.ndarray, batch: Batch, state: State | None) -> cupy.ndarray:
        return self.of(Activations(x, self.gemm.rounded(x)), batch, state)

    def of(self, inputs: Activations, batch: Batch, state: State | None) -> cupy.ndarray:
        """Do what a call does, with an input that is rounded already."""
        tokens = len(inputs.rounded)
        s, of_sequences = self.spec, (batch.cu_seqlens, batch.pages)
        keys, values = state or (None, None)
        table = batch.pages.shape[1], 0 if keys is None else keys.shape[1]
        qkv = self.gemm.linear_rounded(inputs.rounded, self.qkv_proj)
        self.norm_and_rotate(
            (tokens,), ROTATE_THREADS, qkv, self.q_layernorm, self.k_layernorm, self.inverse,
            batch.positions, *of_sequences, keys, values, batch.sequences, *table, s.norm_eps,
        )  # fmt: skip
        heads = self.gemm.empty(tokens, s.num_attention_heads * s.head_dim)
        y, layers = in_layers(batch.sequences)
        grid = (-(-batch.max_seqlen // self.rows), y, layers * s.num_key_value_heads)
        self.attend(
            grid, ATTEND_THREADS, qkv, keys, values, batch.positions, *of_sequences, heads.array,
            heads.extent, batch.sequences, *table, s.head_dim**-0.5,
        )  # fmt: skip
        return self.gemm.linear(heads, self.out_proj)

    def new_state(self, room: Room) -> State:
        shape = keys_shape(self.spec, room)
        return cupy.empty(shape, self.dtype), cupy.empty(shape, self.dtype)


def _stacked(matrices: list[Tensor]) -> Tensor:
    """Return one matrix of all rows, in the format of the matrices if they share one, or in F32."""
    name, matrices = ", ".join(m.name for m in matrices), [readable(m) for m in matrices]
    if len({matrix.format for matrix in matrices}) == 1:
        stacked = np.concatenate([m.data for m in matrices])
        return Tensor.of_array(name, stacked, matrices[0].format)
    return Tensor.of_array(name, np.concatenate([m.float32() for m in matrices]))
