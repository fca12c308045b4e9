"""Turns a MemoryError into a sentence: which block, how many bytes, what to do.

The check in advance (`lfm2kit.building.capacity`) is not enough: it knows only the least that a
model needs, and other processes may take memory meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb
from typing import Any

from lfm2kit.batch import Batch
from lfm2kit.building.byte_counts import size
from lfm2kit.building.capacity import FEWER_SEQUENCES
from lfm2kit.building.placement import Placed
from lfm2kit.errors import Lfm2kitError
from lfm2kit.state import Room
from lfm2kit.weights import Weights


@contextmanager
def building(placed: Placed, weights: Weights) -> Iterator[None]:
    """Explain a MemoryError that occurs while the block of `placed` is built."""
    try:
        yield
    except MemoryError as error:
        stored = size(sum(weights[name].nbytes for name in placed.spec.parameters()))
        raise Lfm2kitError(
            f"there is not enough memory to build {placed.name}, whose weights take {stored} as "
            f"stored{_said(error)}; lfm2kit plan shows what every block takes"
        ) from None


@contextmanager
def making_a_state(room: Room) -> Iterator[None]:
    """Explain a MemoryError that occurs while a state is made."""
    try:
        yield
    except MemoryError as error:
        raise Lfm2kitError(
            f"there is not enough memory for a state of {room.pages} pages{_said(error)}; "
            f"{FEWER_SEQUENCES}"
        ) from None


@contextmanager
def in_a_forward(forward: Any, batch: Batch) -> Iterator[None]:
    """Explain a MemoryError that occurs in the forward of a batch, or with its logits."""
    try:
        yield
    except MemoryError as error:
        layer = _layer_of(error, getattr(forward, "layers", []))
        raise Lfm2kitError(
            f"there is not enough memory for {batch.tokens} tokens at once{layer}"
            f"{_said(error)}; try a smaller batch, or shorter samples"
        ) from None


def _layer_of(error: MemoryError, layers: list[Any]) -> str:
    """Return the layer that raised the error, as its traceback shows."""
    passed = {id(frame.f_locals.get("self")) for frame, _ in walk_tb(error.__traceback__)}
    return next((f" in layers.{i}" for i, layer in enumerate(layers) if id(layer) in passed), "")


def _said(error: MemoryError) -> str:
    """Return the error's text: NumPy and CuPy say how many bytes they asked for."""
    return f" ({error})" if str(error) else ""
