"""How the core makes a larger block of its parts, where no backend builds it whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lfm2kit.backend import Block
from lfm2kit.formats import Format
from lfm2kit.memory import Memory
from lfm2kit.specs import Spec
from lfm2kit.transport import ExchangeOffer


@dataclass(frozen=True, slots=True)
class Join:
    """A way to make a block of the blocks of its spec's parts: `make(spec, **blocks by role)`.

    The parts are given and leave their arrays in `memory`, as the block itself does: where a part
    lives elsewhere, the core moves its arrays.  A block that looks across tokens has the methods
    of `lfm2kit.backend.Operator`.
    """

    make: Callable[..., Block]
    memory: Memory
    is_capturable: bool = True  # whether a recorded call does all that the first one did
    # The bytes in `memory` that such blocks share, for a forward of as many tokens: an exchange's.
    exchange_bytes: Callable[[Any, int], int] = lambda spec, tokens: 0
    offer: ExchangeOffer | None = None  # of the exchange in the block, if there is one
    # Returns what the join is once the formats are known in which its parts read rows, by role:
    # see `lfm2kit.backend.ReadsRows`.  None: it makes no difference.
    reading: Callable[[Mapping[str, Format]], Join] | None = None


# By a spec's type, its join within the memory that surrounds it: `partial(Join, make)` stays there.
Joins = Mapping[type[Spec], Callable[[Memory], Join]]
