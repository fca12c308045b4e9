"""ShortConv: two matrix products around a gated convolution over a few tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import cupy
import numpy as np

from lfm2kit import specs
from lfm2kit.backend import STEP_BACK, Batch, Room, Weights
from lfm2kit_cuda import launching
from lfm2kit_cuda.device import sm_count
from lfm2kit_cuda.kernels import load_kernel
from lfm2kit_cuda.paging import most_pages, rows_shape, window
from lfm2kit_cuda.products import Activations, Arithmetic
from lfm2kit_cuda.upload import upload

SOURCE, THREADS = "blocks/short_conv", 256
MANY_ROWS = 4  # of a thread, where there are enough for all SMs: it computes u of two more


class State(NamedTuple):
    """The newest rows of u = B * X of each page: that of position p at p % page_tokens % window."""

    rows: cupy.ndarray  # float32 [pages, window, hidden_size]
    page_tokens: int


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
        self.ctas = -(-spec.hidden_size // (THREADS * vector))  # per row
        constants: dict[str, Any] = {
            "KERNEL_SIZE": spec.kernel_size,
            "WINDOW": window(spec),
            "VECTOR": vector,
            "INNER": gemm.activation,
        }
        self.convolve = {
            rows: load_kernel(SOURCE, "convolve", ROWS=rows, **constants) for rows in (1, MANY_ROWS)
        }
        self.remember = load_kernel(SOURCE, "remember", ROWS=1, **constants)

    def __call__(self, x: cupy.ndarray, batch: Batch, state: State | None) -> cupy.ndarray:
        return self.of(Activations(x, self.gemm.rounded(x)), batch, state)

    def of(self, inputs: Activations, batch: Batch, state: State | None) -> cupy.ndarray:
        """Do what a call does, with an input that is rounded already."""
        h, tokens, width = self.spec.hidden_size, len(inputs.rounded), batch.pages.shape[1]
        rows, page_tokens = state or (None, 0)
        BCX = self.gemm.linear_rounded(inputs.rounded, self.in_proj, self.in_bias)
        y = self.gemm.empty(tokens, h)
        of_sequences = batch.positions, batch.cu_seqlens, batch.pages
        keeps = state is not None and batch.max_seqlen <= STEP_BACK
        of_thread = 1 if tokens * self.ctas <= sm_count() else MANY_ROWS
        self.convolve[of_thread](
            (-(-tokens // of_thread), self.ctas), THREADS, BCX, self.taps, self.conv_bias,
            *of_sequences, rows, y.array, keeps, batch.sequences, width, page_tokens, tokens, h,
            y.extent,
        )  # fmt: skip
        if state is not None and not keeps:
            pages, most = most_pages(batch.max_seqlen, page_tokens), launching.MOST_CTAS
            for skipped in range(0, pages, most):  # once, for chunks of less than 4 million tokens
                grid = batch.sequences, self.ctas, min(most, pages - skipped)
                self.remember(
                    grid, THREADS, BCX, *of_sequences, rows, skipped, width, page_tokens, h
                )
        return self.gemm.linear(y, self.out_proj, self.out_bias)

    def new_state(self, room: Room) -> State:
        return State(cupy.empty(rows_shape(self.spec, room), cupy.float32), room.page_tokens)
