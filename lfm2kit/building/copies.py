"""Counts the arrays that a forward copies from one memory to another."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import NamedTuple

from lfm2kit.batch_rules import ARRAYS
from lfm2kit.building.placement import Placed
from lfm2kit.memory import HOST


class _Arrays(NamedTuple):
    """The arrays of a block's call, but for those of a batch and a state."""

    taken: int
    returned: int
    takes_batch: bool = False


# By the kind of a spec, which says what stands in its place in the forward.
OF_KIND = {
    "model": _Arrays(0, 1, takes_batch=True),
    "embed": _Arrays(0, 1, takes_batch=True),
    "layer": _Arrays(2, 2, takes_batch=True),
    "norm": _Arrays(2, 2),
    "conv": _Arrays(1, 1, takes_batch=True),
    "attn": _Arrays(1, 1, takes_batch=True),
    "choice": _Arrays(1, 2),
    "router": _Arrays(1, 2),
    "experts": _Arrays(3, 1),
    "streamed_experts": _Arrays(3, 1),
    "rows": _Arrays(2, 2, takes_batch=True),
}
OTHERS = _Arrays(1, 1)  # x and delta, scores or logits


class Copies(NamedTuple):
    """The arrays that a forward copies; one between two devices counts twice, for both ways."""

    around: int  # blocks in another memory: their arguments and results
    batch: int
    logits: int

    @property
    def total(self) -> int:
        return sum(self)


def copies_of(model: Placed) -> Copies:
    """Return the arrays that a forward of the model copies, if it is not a replay."""
    batches = set(_batches(model)) | {(model.outer.name, None)}
    abroad = [name for name, _ in batches if name != HOST.name]
    logits = int(model.outer.name != HOST.name)
    return Copies(sum(_around(model)), len(ARRAYS) * len(abroad), logits)


def _around(placed: Placed, is_first: bool = False) -> Iterator[int]:
    """Yield the copies around each block; the model's first norm gets no delta if it `is_first`."""
    if placed.is_copied:
        arrays = OF_KIND.get(placed.spec.kind, OTHERS)
        ways = sum(memory.name != HOST.name for memory in (placed.memory, placed.outer))
        yield ways * (arrays.taken - is_first + arrays.returned)
    for role, part in placed.parts:
        begins = placed.spec.kind == "model" and role == "layers.0"
        goes_on = is_first and (part.spec.kind == "layer" or role == "operator_norm")
        yield from _around(part, begins or goes_on)


def _batches(placed: Placed, key: Hashable = None) -> Iterator[tuple[str, Hashable]]:
    """Yield the memories in which blocks get a batch: the model's, or what one is derived by."""
    if OF_KIND.get(placed.spec.kind, OTHERS).takes_batch:
        yield placed.memory.name, key
    if (derived := placed.spec.derives()) is not None:
        key = derived
        yield placed.memory.name, key
    for _, part in placed.parts:
        yield from _batches(part, key)
