"""A batch in tensors, and the sequences in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lfm2kit.backend import HOST, Batch
from lfm2kit_torch.device import Device


@dataclass(frozen=True, slots=True)
class Sequence:
    rows: slice  # of the batch
    start: int  # the position of the first row
    positions: Tensor  # [rows]
    pages: Tensor  # [width]


@dataclass(frozen=True, slots=True)
class TensorBatch:
    token_ids: Tensor  # [tokens]
    positions: Tensor  # [tokens]
    pages: Tensor  # [sequences, width]
    logits_rows: Tensor  # [logits]
    host: Batch  # says where sequences begin, without waiting for a device

    @classmethod
    def of(cls, batch: Batch, device: Device) -> TensorBatch:
        return cls(
            token_ids=device.tensor(batch.token_ids),
            positions=device.tensor(batch.positions),
            pages=device.tensor(batch.pages),
            logits_rows=device.tensor(batch.logits_rows),
            host=batch.on(HOST),
        )

    def sequences(self) -> Iterator[Sequence]:
        begins = self.host.cu_seqlens.tolist()
        for i, (begin, end) in enumerate(pairwise(begins)):
            start = int(self.host.positions[begin])
            positions = self.positions[begin:end]
            yield Sequence(slice(begin, end), start, positions, self.pages[i])


def page_and_place(pages: Tensor, positions: Tensor, page_tokens: int) -> tuple[Tensor, Tensor]:
    """Return the page of each position of a sequence that has these pages, and the token in it."""
    return pages[positions // page_tokens], torch.remainder(positions, page_tokens)
