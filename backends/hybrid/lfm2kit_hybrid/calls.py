"""The blocks that workers call, by the number of the call: for machine code, and for Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lfm2kit.backend import Block, Call, Fills, NativeCall
from lfm2kit_hybrid.polling import ARGUMENT, ENTRY, FUNCTION, INPUTS, PARTS, RESULTS, ROWS


@dataclass(frozen=True, slots=True)
class Called:
    """A block, and the arrays that it is called with."""

    name: str  # the block's, in the model
    block: Block
    call: Call
    native: NativeCall | None
    takes_some_rows: bool  # of its arguments' first ones; such a call is not native
    addresses: tuple[npt.NDArray[np.uintp], ...] = field(init=False)  # of inputs, of results
    fill: Callable[..., None] | None = field(init=False)  # the block's, if it has one

    def __post_init__(self) -> None:
        both = (self.call.inputs, self.call.results)
        object.__setattr__(self, "addresses", tuple(map(_addresses, both)))
        # Asked once: it takes some 15 us, and the block is called in every layer.
        fill = self.block.fill if isinstance(self.block, Fills) else None
        object.__setattr__(self, "fill", fill)

    def entry(self, parts: int) -> list[int]:
        """Return the call as `polling.poll` reads it; without machine code its function is 0."""
        entry = [0] * ENTRY
        inputs, results = self.addresses
        entry[INPUTS], entry[RESULTS] = inputs.ctypes.data, results.ctypes.data
        entry[ROWS], entry[PARTS] = len(self.call.inputs[0]), parts
        if self.native is not None:
            entry[FUNCTION], entry[ARGUMENT] = self.native.function, self.native.argument
        return entry

    def __call__(self, rows: int) -> None:
        """Call the block from Python, and leave its results where the memory takes them.

        `rows` came with the trip: all there are, unless the crossing sends only those it needs.
        """
        inputs, targets = self.call.inputs, self.call.results
        if self.takes_some_rows:
            inputs, targets = ([array[:rows] for array in arrays] for arrays in (inputs, targets))
        if self.fill is not None:
            self.fill(targets, *inputs)
            return
        results = self.block(*inputs)
        results = results if isinstance(results, tuple) else (results,)
        for target, result in zip(targets, results, strict=True):
            if result.shape != target.shape or result.dtype != target.dtype:
                raise ValueError(
                    f"it returned {result.dtype} {result.shape}, and {target.dtype} "
                    f"{target.shape} before"
                )
            target[...] = result


class Calls:
    """All calls of a channel, in a table that grows while others read it."""

    def __init__(self, publish: Callable[[npt.NDArray[Any]], None]) -> None:
        self._publish = publish  # tells the workers of a new table
        self._calls: dict[int, Called] = {}  # an interrupt may have left out a number
        self._table = np.zeros((64, ENTRY), np.int64)
        self._outgrown: list[npt.NDArray[np.int64]] = []  # a worker may be reading one of them
        publish(self._table)

    def __getitem__(self, number: int) -> Called:
        return self._calls[number]

    def add(self, called: Called, parts: int) -> None:
        """Add the channel's newest call, before its first trip."""
        number = called.call.number
        while number >= len(self._table):
            self._outgrown.append(self._table)
            self._table = np.concatenate([self._table, np.zeros_like(self._table)])
            self._publish(self._table)
        self._table[number] = called.entry(parts)
        self._calls[number] = called


def _addresses(arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.uintp]:
    assert all(array.flags.c_contiguous for array in arrays), "arrays of a call have no gaps"
    return np.array([array.ctypes.data for array in arrays], np.uintp)
