"""Whether models fit into their memories together, before any of them is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lfm2kit.backend import HOST
from lfm2kit.building.capacity import Shortage
from lfm2kit.building.loading import Setup
from lfm2kit.errors import Lfm2kitError, Option


def check_memory(setups: Sequence[Setup], tokens: int, logits_bytes: int) -> None:
    """Raise `Lfm2kitError` if a memory is too small for the models and for a batch.

    `tokens` are those of a batch, and `logits_bytes` what its logits take in the host's memory.
    """
    for one in setups:
        if (shortage := one.shortage()) is not None:
            raise shortage  # it says with which options the model fits
    for memory, free in _free(setups).items():
        needed = [one.sizes.needed(one.placed, memory, tokens) for one in setups]
        kept = sum(each.kept for each in needed)
        if kept > free:
            short = Shortage(memory, "the comparison of two models", kept, free)
            raise Lfm2kitError(f"{short}; compare with a model or plan that takes less")
        kept += max(each.scratch for each in needed) + logits_bytes * (memory == HOST.name)
        if kept > free:
            short = Shortage(memory, f"scoring {tokens} tokens at once", kept, free)
            raise Lfm2kitError(f"{short}; give a smaller ", Option("window"))


def _free(setups: Sequence[Setup]) -> Mapping[str, int]:
    """Return the free bytes by memory, without what models pin of the host's."""
    free = {name: size for one in setups for name, size in one.sizes.free(one.placed).items()}
    pinned = sum(one.sizes.pinned(leaf) for one in setups for leaf in one.placed.leaves())
    return {name: size - pinned * (name == HOST.name) for name, size in free.items()}
