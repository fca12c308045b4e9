"""What a model remembers of sequences, in pages, and which batches may continue them.

A sequence's tokens lie in pages of `page_tokens` tokens each.  Whoever makes batches owns the page
numbers: `Batch.pages` names the pages of each sequence, in order.  Blocks own what is in the pages.
Sequences with a common beginning may share its whole pages, as long as nobody writes them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lfm2kit.ledger import STEP_BACK, Ledger

__all__ = ["PAGE_STEP", "STEP_BACK", "ModelState", "Room", "State"]

State = Any  # opaque to the core: made by an operator's `new_state`, handed back to it only

MOST_TOKENS = 2**31 - 1  # kernels count the tokens of a state in int32
PAGE_STEP = 64  # tokens: `page_tokens` is a multiple of it, so that tiles of keys lie within a page


@dataclass(frozen=True, slots=True)
class Room:
    """The number of tokens that a state can hold: `pages` pages of `page_tokens` tokens each.

    Raise ValueError if `pages` is not a whole number of 0 or more, or `page_tokens` not a positive
    multiple of 64.
    """

    pages: int
    page_tokens: int = 128

    def __post_init__(self) -> None:
        object.__setattr__(self, "pages", _whole("pages", self.pages))
        object.__setattr__(self, "page_tokens", _whole("page_tokens", self.page_tokens))
        if self.page_tokens == 0 or self.page_tokens % PAGE_STEP:
            raise ValueError(
                f"page_tokens is {self.page_tokens}, but must be a multiple of {PAGE_STEP}"
            )
        if self.pages * self.page_tokens > MOST_TOKENS:
            raise ValueError(
                f"{self.pages} pages of {self.page_tokens} tokens are more than the {MOST_TOKENS} "
                "tokens that a state may hold"
            )

    def pages_of(self, tokens: int) -> int:
        """Return how many pages a sequence of `tokens` tokens takes."""
        return -(-_whole("tokens", tokens) // self.page_tokens)

    @classmethod
    def of_sequences(cls, sequences: int, tokens: int, page_tokens: int = 128) -> Room:
        """Return room for `sequences` sequences of up to `tokens` tokens each."""
        pages = cls(0, page_tokens).pages_of(tokens)
        return cls(_whole("sequences", sequences) * pages, page_tokens)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class ModelState:
    """A model's state: what every layer's operator remembers of the tokens in `room`'s pages.

    A model takes the states that its `new_state` returned: a copy with another room would have
    blocks write beyond what the layers hold.
    """

    room: Room
    layers: list[State]
    ledger: Ledger = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ledger", Ledger(self.room))

    def __repr__(self) -> str:
        return (
            f"<ModelState of {len(self.layers)} layers, {self.room.pages} pages of "
            f"{self.room.page_tokens} tokens>"
        )


def _whole(name: str, value: Any) -> int:
    """Return `value` as an int; ValueError if it is not a whole number of 0 or more."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
        raise ValueError(f"{name} is {value!r}, but must be a whole number of 0 or more")
    return int(value)
