"""The windows that slide over a text, and a batch of several of them.

As in transformers' documentation of perplexity: each window begins `stride` tokens after the one
before, and only the tokens that no earlier window has scored are scored in it.  So every token but
the first is scored once, after at least `size - stride` tokens wherever the text has as many.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lfm2kit import Batch
from lfm2kit.errors import Lfm2kitError, Option

Int32 = npt.NDArray[np.int32]


class Window(NamedTuple):
    """The tokens `begin` to `end` of a text, of which those from `first` on are scored."""

    begin: int
    first: int
    end: int


def check_sizes(size: int, stride: int, context: int) -> None:
    """Raise `Lfm2kitError` for windows that are too long, or that leave tokens out."""
    if size < 2:
        raise Lfm2kitError(Option("window", size), ": expected 2 tokens or more")
    if size > context:
        asked = Option("window", size)
        raise Lfm2kitError(asked, f": the model's context has {context} tokens; give fewer")
    if not 1 <= stride < size:
        raise Lfm2kitError(
            Option("stride", stride),
            f": expected a number from 1 to {size - 1}, below ",
            Option("window", size),
        )


def windows(tokens: int, size: int, stride: int) -> Iterator[Window]:
    """Yield the windows over a text of two tokens or more."""
    first = 1
    for begin in range(0, tokens, stride):
        end = min(begin + size, tokens)
        yield Window(begin, first, end)
        if end == tokens:
            return
        first = end


def batch_of(ids: Int32, some: Sequence[Window]) -> Batch:
    """Return a batch of windows that asks for the logits before each token that is scored."""
    batch = Batch.of_sequences([ids[one.begin : one.end] for one in some])
    rows = [
        start + np.arange(one.first - 1, one.end - 1) - one.begin
        for start, one in zip(batch.cu_seqlens, some, strict=False)
    ]
    return replace(batch, logits_rows=np.concatenate(rows).astype(np.int32))
