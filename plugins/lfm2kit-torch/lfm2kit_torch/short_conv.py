"""ShortConv: a gated causal convolution over a few tokens of the same sequence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lfm2kit import specs
from lfm2kit.backend import STEP_BACK, Room, Weights
from lfm2kit_torch.batches import Sequence, TensorBatch, page_and_place
from lfm2kit_torch.device import Device
from lfm2kit_torch.linear import Linear, stored


class State(NamedTuple):
    """The newest rows of u in each page: that of place p at p % window.

    Besides the rows before the next token they include those that a sequence may go back.
    """

    rows: Tensor  # [pages, window, hidden_size], window = kernel_size - 1 + STEP_BACK
    page_tokens: int

    def read(self, pages: Tensor, positions: Tensor) -> Tensor:
        return self.rows[self._at(pages, positions)]

    def write(self, pages: Tensor, positions: Tensor, u: Tensor) -> None:
        """Keep a chunk's rows, but for those that a later one of their page would replace."""
        page_ends = (positions // self.page_tokens + 1) * self.page_tokens
        ends = torch.minimum(page_ends, positions[-1] + 1)
        kept = positions >= ends - self.rows.shape[1]
        self.rows[self._at(pages, positions[kept])] = u[kept]

    def _at(self, pages: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        page, place = page_and_place(pages, positions, self.page_tokens)
        return page, place % self.rows.shape[1]


class ShortConv:
    def __init__(self, spec: specs.ShortConv, weights: Weights, device: Device) -> None:
        self.in_proj = Linear(weights.scope("in_proj"), device, spec.bias)
        self.out_proj = Linear(weights.scope("out_proj"), device, spec.bias)
        self.taps = stored(weights, "conv.weight", device)  # [hidden_size, 1, kernel_size]
        self.bias = stored(weights, "conv.bias", device) if spec.bias else None
        self.spec = spec
        self.past = spec.kernel_size - 1

    def __call__(self, x: Tensor, batch: TensorBatch, state: State | None) -> Tensor:
        B, C, X = self.in_proj(x).chunk(3, dim=1)
        u = B * X
        y = torch.empty_like(u)
        for one in batch.sequences():
            y[one.rows] = self._convolve(torch.cat([self._past(u, one, state), u[one.rows]]))
            if state is not None:
                state.write(one.pages, one.positions, u[one.rows])
        return self.out_proj(C * y)

    def new_state(self, room: Room) -> State:
        shape = state_shape(self.spec, room)
        return State(self.taps.new_empty(shape, dtype=torch.float32), room.page_tokens)

    def _past(self, u: Tensor, one: Sequence, state: State | None) -> Tensor:
        """Return the rows of u before a sequence's; those before its start are zeros."""
        past = u.new_zeros(self.past, u.shape[1])
        there = min(one.start, self.past)
        if state is not None and there:
            before = torch.arange(one.start - there, one.start, device=u.device)
            past[-there:] = state.read(one.pages, before)
        return past

    def _convolve(self, u: Tensor) -> Tensor:
        """Convolve [past + tokens, hidden_size] to [tokens, hidden_size].

        `conv1d` would be TF32 on a GPU, whatever products are.
        """
        tokens = len(u) - self.past
        taps = self.taps.float()
        y = sum(taps[:, 0, j] * u[j : j + tokens] for j in range(self.past + 1))
        return y if self.bias is None else y + self.bias.float()


def state_shape(spec: specs.ShortConv, room: Room) -> tuple[int, int, int]:
    return room.pages, spec.kernel_size - 1 + STEP_BACK, spec.hidden_size
