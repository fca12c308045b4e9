"""ShortConv: a gated causal convolution over a few tokens of the same sequence."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lfm2kit import specs
from lfm2kit.backend import PADDING, Batch, Room, Weights
from lfm2kit.reference.linear import Float32, Float64, float64, linear
from lfm2kit.state import STEP_BACK

Int32 = npt.NDArray[np.int32]


class State(NamedTuple):
    """The newest rows of u in each page: that of position p at p % page_tokens % window.

    Besides the rows before the next token they include those that a sequence may go back.
    """

    rows: Float64  # [pages, window, hidden_size], window = kernel_size - 1 + STEP_BACK
    page_tokens: int

    def at(self, pages: Int32, positions: Int32) -> tuple[Int32, Int32]:
        """Return the page and the place of the rows of these positions of a sequence."""
        page, token = np.divmod(positions, self.page_tokens)
        return pages[page], token % self.rows.shape[1]

    def kept(self, positions: Int32) -> npt.NDArray[np.bool_]:
        """Return which of a chunk's rows stay: those that no later one of their page replaces."""
        page_ends = (positions // self.page_tokens + 1) * self.page_tokens
        ends = np.minimum(page_ends, positions[-1] + 1)
        return np.asarray(positions >= ends - self.rows.shape[1])


class ShortConv:
    def __init__(self, spec: specs.ShortConv, weights: Weights) -> None:
        self.spec = spec
        self.weights = weights
        self.taps = float64(weights["conv.weight"])[:, 0, :].T  # [kernel_size, hidden_size]

    def __call__(self, x: Float32, batch: Batch, state: State | None) -> Float32:
        B, C, X = np.split(self._linear(x, "in_proj"), 3, axis=1)
        u = B * X
        y = np.zeros_like(u)
        for i, pages in enumerate(batch.pages):
            rows = slice(batch.cu_seqlens[i], batch.cu_seqlens[i + 1])
            positions = batch.positions[rows]
            if positions[0] == PADDING:
                continue
            past = self._past(state, pages, positions[0])
            y[rows] = self._convolve(np.concatenate([past, u[rows]]))
            if state is not None:
                kept = state.kept(positions)
                state.rows[state.at(pages, positions[kept])] = u[rows][kept]
        return self._linear(C * y, "out_proj").astype(np.float32)

    def new_state(self, room: Room) -> State:
        window = self.spec.kernel_size - 1 + STEP_BACK
        return State(np.empty((room.pages, window, self.spec.hidden_size)), room.page_tokens)

    def _past(self, state: State | None, pages: Int32, start: int) -> Float64:
        """Return the rows of u before position `start`; those before the sequence are zero."""
        past = np.zeros((self.spec.kernel_size - 1, self.spec.hidden_size))
        before = np.arange(start - len(past), start, dtype=np.int32)
        if state is not None:
            past[before >= 0] = state.rows[state.at(pages, before[before >= 0])]
        return past

    def _convolve(self, u: Float64) -> Float64:
        """Convolve [kernel_size - 1 + tokens, hidden_size] to [tokens, hidden_size]."""
        tokens = len(u) - self.spec.kernel_size + 1
        y = sum(tap * u[j : j + tokens] for j, tap in enumerate(self.taps))
        return y + float64(self.weights["conv.bias"]) if self.spec.bias else np.asarray(y)

    def _linear(self, x: Float32 | Float64, name: str) -> Float64:
        bias = self.weights[f"{name}.bias"] if self.spec.bias else None
        return linear(x, self.weights[f"{name}.weight"], bias)


def state_bytes(spec: specs.ShortConv, room: Room) -> int:
    return 8 * room.pages * (spec.kernel_size - 1 + STEP_BACK) * spec.hidden_size
