"""ShortConv: two matrix products around a gated convolution over a few tokens."""

from __future__ import annotations

import cupy
import numpy as np

from lfm2kit import specs
from lfm2kit.backend import Batch, Weights
from lfm2kit_cuda.kernels import load_kernel
from lfm2kit_cuda.products import Activations, Arithmetic
from lfm2kit_cuda.upload import upload

SOURCE, THREADS = "blocks/short_conv", 256
ROWS = 4  # of a thread; kRows in short_conv.cu


class ShortConv:
    def __init__(self, spec: specs.ShortConv, weights: Weights, gemm: Arithmetic) -> None:
        self.spec = spec
        self.gemm = gemm
        self.in_proj = gemm.pack([weights["in_proj.weight"]])
        self.out_proj = gemm.pack([weights["out_proj.weight"]])
        self.taps = upload(np.ascontiguousarray(weights.float32("conv.weight")[:, 0, :].T))
        self.in_bias, self.conv_bias, self.out_bias = (
            upload(weights.float32(f"{name}.bias")) if spec.bias else None
            for name in ("in_proj", "conv", "out_proj")
        )
        vector = 4 if spec.hidden_size % 4 == 0 else 1
        self.blocks = -(-spec.hidden_size // (THREADS * vector))  # of threads, per row
        constants = {"KERNEL_SIZE": spec.kernel_size, "VECTOR": vector, "INNER": gemm.activation}
        self.convolve = load_kernel(SOURCE, "convolve", **constants)
        self.remember = load_kernel(SOURCE, "remember", **constants)

    def __call__(self, x: cupy.ndarray, batch: Batch, state: cupy.ndarray | None) -> cupy.ndarray:
        return self.of(Activations(x, self.gemm.rounded(x)), batch, state)

    def of(self, inputs: Activations, batch: Batch, state: cupy.ndarray | None) -> cupy.ndarray:
        """As a call, of an input that is rounded already."""
        h, tokens = self.spec.hidden_size, len(inputs.rounded)
        BCX = self.gemm.linear_rounded(inputs.rounded, self.in_proj, self.in_bias)
        y = self.gemm.empty(tokens, h)
        self.convolve(
            (-(-tokens // ROWS), self.blocks), THREADS, BCX, self.taps, self.conv_bias,
            batch.positions, batch.cu_seqlens, batch.state_slots, state, y.array, batch.sequences,
            tokens, h, y.extent,
        )  # fmt: skip
        if state is not None:
            of_sequences = batch.cu_seqlens, batch.state_slots
            self.remember((batch.sequences, self.blocks), THREADS, BCX, *of_sequences, state, h)
        return self.gemm.linear(y, self.out_proj, self.out_bias)

    def new_state(self, slots: int, max_tokens: int) -> cupy.ndarray:
        """The last kernel_size - 1 rows of u = B * X of each slot."""
        shape = (slots, self.spec.kernel_size - 1, self.spec.hidden_size)
        return cupy.empty(shape, cupy.float32)

    def state_bytes(self, slots: int, max_tokens: int) -> int:
        return 4 * slots * (self.spec.kernel_size - 1) * self.spec.hidden_size
