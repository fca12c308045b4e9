"""ShortConv: two matrix products around a gated convolution over a few tokens."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types

from lfm2kit import specs
from lfm2kit.backend import Batch, Format, Weights
from lfm2kit_cpu_simd.buffers import BUFFERS
from lfm2kit_cpu_simd.compiling import kernel
from lfm2kit_cpu_simd.gemm import NO_BIAS, Float32, linear
from lfm2kit_cpu_simd.packing import pack
from lfm2kit_cpu_simd.signatures import IDS, PAST, ROWS, ROWS_OUT, STATE_OUT, VECTOR

NO_STATE = np.empty((0, 0, 0), np.float32)


class ShortConv:
    def __init__(self, spec: specs.ShortConv, weights: Weights, format: Format | None) -> None:
        self.spec = spec
        self.in_proj = pack([[weights["in_proj.weight"]]], format)
        self.out_proj = pack([[weights["out_proj.weight"]]], format)
        taps = weights.float32("conv.weight")[:, 0, :].T
        self.taps = np.ascontiguousarray(taps)  # [kernel_size, hidden_size]
        biases = [f"{name}.bias" for name in ("in_proj", "conv", "out_proj")]
        self.in_bias, self.conv_bias, self.out_bias = (
            np.array(weights.float32(name)) if spec.bias else NO_BIAS for name in biases
        )

    def __call__(self, x: Float32, batch: Batch, state: Float32 | None) -> Float32:
        h = self.spec.hidden_size
        BCX = linear(x, self.in_proj, 3 * h, self.in_bias, buffer="projected")
        gated = BUFFERS.array("gated", len(x), h)
        past = NO_STATE if state is None else state
        _convolve(BCX, self.taps, self.conv_bias, batch.cu_seqlens, batch.positions,
                  batch.state_slots, past, gated)  # fmt: skip
        if state is not None:
            _remember(BCX, batch.cu_seqlens, batch.positions, batch.state_slots, state)
        return linear(gated, self.out_proj, h, self.out_bias)

    def new_state(self, slots: int, max_tokens: int) -> Float32:
        """The last kernel_size - 1 rows of u = B * X of each slot."""
        return np.empty((slots, self.spec.kernel_size - 1, self.spec.hidden_size), np.float32)

    def state_bytes(self, slots: int, max_tokens: int) -> int:
        return 4 * slots * (self.spec.kernel_size - 1) * self.spec.hidden_size


@kernel(
    types.void(ROWS, ROWS, VECTOR, IDS, IDS, IDS, PAST, ROWS_OUT),
    parallel=True,
)
def _convolve(
    BCX: Any, taps: Any, bias: Any, cu_seqlens: Any, positions: Any, slots: Any, past: Any, out: Any
) -> None:
    """out[t] = C[t] * (sum_j taps[j] * u[t - (kernel - 1) + j] + bias), u = B * X.

    A row computes the u of the rows before it anew: it then depends on no other row's turn.
    """
    kernel, h = taps.shape
    for t in numba.prange(BCX.shape[0]):
        sequence = np.searchsorted(cu_seqlens, t, side="right") - 1
        first = cu_seqlens[sequence]
        y = np.zeros(h, np.float32)
        for j in range(kernel):
            row = t - (kernel - 1) + j
            if row >= first:
                for c in range(h):
                    y[c] += taps[j, c] * (BCX[row, c] * BCX[row, 2 * h + c])
            elif past.size and positions[t] - (kernel - 1) + j >= 0:
                back = past.shape[1] - (first - row)  # counted from the state's newest row
                for c in range(h):
                    y[c] += taps[j, c] * past[slots[sequence], back, c]
        for c in range(h):
            if bias.size:
                y[c] += bias[c]
            out[t, c] = BCX[t, h + c] * y[c]


@kernel(types.void(ROWS, IDS, IDS, IDS, STATE_OUT))
def _remember(BCX: Any, cu_seqlens: Any, positions: Any, slots: Any, state: Any) -> None:
    """Leaves the newest rows of u in each sequence's slot, moving older ones up."""
    h = state.shape[2]
    for sequence in range(slots.shape[0]):
        rows = cu_seqlens[sequence + 1] - cu_seqlens[sequence]
        slot = slots[sequence]
        for i in range(state.shape[1]):
            row = cu_seqlens[sequence + 1] - state.shape[1] + i
            if row >= cu_seqlens[sequence]:
                for c in range(h):
                    state[slot, i, c] = BCX[row, c] * BCX[row, 2 * h + c]
            else:
                for c in range(h):
                    state[slot, i, c] = state[slot, i + rows, c]
