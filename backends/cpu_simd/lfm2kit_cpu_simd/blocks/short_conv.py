"""ShortConv: two matrix products around a gated convolution over a few tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
from numba import types

from lfm2kit import specs
from lfm2kit.backend import STEP_BACK, Batch, Format, Room, Weights
from lfm2kit_cpu_simd.buffers import BUFFERS
from lfm2kit_cpu_simd.compiling import kernel
from lfm2kit_cpu_simd.gemm import NO_BIAS, Float32, linear
from lfm2kit_cpu_simd.packing import pack
from lfm2kit_cpu_simd.signatures import (
    BOOL,
    IDS,
    IDS_2D,
    INT,
    ROWS,
    ROWS_OUT,
    STATE_OUT,
    VECTOR,
)


class State(NamedTuple):
    """The newest rows of u of each page: that of position p at p % page_tokens % window.

    Besides the rows before the next token they are those that a sequence may go back.
    """

    rows: Float32  # [pages, window, hidden_size], window = kernel_size - 1 + STEP_BACK
    page_tokens: int


NO_STATE = State(np.empty((0, 0, 0), np.float32), 1)
SHORT = STEP_BACK  # rows of a chunk whose u replaces no row before it that it reads


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

    def __call__(self, x: Float32, batch: Batch, state: State | None) -> Float32:
        h = self.spec.hidden_size
        BCX = linear(x, self.in_proj, 3 * h, self.in_bias, buffer="projected")
        gated = BUFFERS.array("gated", len(x), h)
        rows, page_tokens = NO_STATE if state is None else state
        is_short = state is not None and batch.max_seqlen <= SHORT  # then one kernel does both
        _convolve(BCX, self.taps, self.conv_bias, batch.cu_seqlens, batch.positions,
                  batch.pages, page_tokens, is_short, rows, gated)  # fmt: skip
        if state is not None and not is_short:
            _remember(BCX, batch.cu_seqlens, batch.positions, batch.pages, page_tokens, rows)
        return linear(gated, self.out_proj, h, self.out_bias)

    def new_state(self, room: Room) -> State:
        window = self.spec.kernel_size - 1 + STEP_BACK
        shape = (room.pages, window, self.spec.hidden_size)
        return State(np.empty(shape, np.float32), room.page_tokens)


@numba.njit(inline="always")
def _place(position: Any, pages: Any, page_tokens: Any, window: Any) -> Any:
    """Return the page of a sequence's row of u, and the row's place there."""
    return pages[position // page_tokens], position % page_tokens % window


@numba.njit(inline="always")
def _keep(BCX: Any, t: Any, page: Any, place: Any, state: Any) -> None:
    """Put the u of row t into its page."""
    h = state.shape[2]
    for c in range(h):
        state[page, place, c] = BCX[t, c] * BCX[t, 2 * h + c]


@kernel(
    types.void(ROWS, ROWS, VECTOR, IDS, IDS, IDS_2D, INT, BOOL, STATE_OUT, ROWS_OUT),
    parallel=True,
    error_model="numpy",
)
def _convolve(
    BCX: Any,
    taps: Any,
    bias: Any,
    cu_seqlens: Any,
    positions: Any,
    pages: Any,
    page_tokens: Any,
    keeps: Any,
    state: Any,
    out: Any,
) -> None:
    """Compute out[t] = C[t] * (sum_j taps[j] * u[t - (kernel - 1) + j] + bias), u = B * X.

    A row computes the u of the rows before it again, so that it waits for no other row.  If
    `keeps`, every row's u is put into its page.
    """
    kernel, h = taps.shape
    window = state.shape[1]
    for t in numba.prange(BCX.shape[0]):
        sequence = np.searchsorted(cu_seqlens, t, side="right") - 1
        first = cu_seqlens[sequence]
        y = np.zeros(h, np.float32)
        for j in range(kernel):
            back = kernel - 1 - j
            row, position = t - back, positions[t] - back
            if row >= first:
                for c in range(h):
                    y[c] += taps[j, c] * (BCX[row, c] * BCX[row, 2 * h + c])
            elif window and position >= 0:
                page, place = _place(position, pages[sequence], page_tokens, window)
                for c in range(h):
                    y[c] += taps[j, c] * state[page, place, c]
        for c in range(h):
            if bias.size:
                y[c] += bias[c]
            out[t, c] = BCX[t, h + c] * y[c]
        if keeps:
            page, place = _place(positions[t], pages[sequence], page_tokens, window)
            _keep(BCX, t, page, place, state)


@kernel(
    types.void(ROWS, IDS, IDS, IDS_2D, INT, STATE_OUT),
    parallel=True,
    error_model="numpy",
)
def _remember(
    BCX: Any, cu_seqlens: Any, positions: Any, pages: Any, page_tokens: Any, state: Any
) -> None:
    """Put the rows of u into their pages, but for those that a later row would replace."""
    window = state.shape[1]
    for t in numba.prange(BCX.shape[0]):
        sequence = np.searchsorted(cu_seqlens, t, side="right") - 1
        later = cu_seqlens[sequence + 1] - 1 - t  # rows of the sequence, and of them in the page
        later_there = min(later, page_tokens - 1 - positions[t] % page_tokens)
        if later_there < window:
            page, place = _place(positions[t], pages[sequence], page_tokens, window)
            _keep(BCX, t, page, place, state)
