"""Rows picked in the memory of a device that is a thread: the contract of `lfm2kit.crossing`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from lfm2kit.testing.device import DeviceArray, DeviceMemory

NOBODYS = 0xA5  # what the bytes of rows are that nobody may read


class DevicePicker:
    """Picks the rows that have one of the wanted ids."""

    def __init__(self, memory: DeviceMemory, wanted: Collection[int]) -> None:
        self.made_picked: type[DevicePicked] = DevicePicked
        self._memory = memory
        self._wanted = list(wanted)

    def __call__(self, arrays: Sequence[DeviceArray], ids: DeviceArray) -> DevicePicked:
        memory, wanted = self._memory, self._wanted

        def find(made: DeviceArray) -> None:
            made.values = np.asarray(np.isin(ids.values, wanted).any(axis=1))

        rows = memory.made(ids.shape[:1], find)
        count = memory.made((1,), lambda made: made.take(rows.values.sum(keepdims=True)))
        return self.made_picked(memory, rows, count, [_picked(memory, rows, one) for one in arrays])


class DevicePicked:
    """Rows of arrays, one behind the other."""

    def __init__(
        self,
        memory: DeviceMemory,
        rows: DeviceArray,
        count: DeviceArray,
        arrays: Sequence[DeviceArray],
    ) -> None:
        self.memory = memory
        self.rows = rows  # bool [rows]: which are picked
        self.count = count
        self.arrays = tuple(arrays)

    def put_back(self, array: DeviceArray) -> DeviceArray:
        def make(made: DeviceArray) -> None:
            values = np.zeros_like(array.values)
            values[self.rows.values] = array.values[: self.count.values[0]]
            made.values = values

        return self.memory.made(array.shape, make)


def _picked(memory: DeviceMemory, rows: DeviceArray, array: DeviceArray) -> DeviceArray:
    def make(made: DeviceArray) -> None:
        values = poisoned(array.values)
        some = array.values[rows.values]
        values[: len(some)] = some
        made.values = values

    return memory.made(array.shape, make)


def poisoned(like: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return an array of this shape and dtype whose bytes nobody may read."""
    values = np.empty_like(like, order="C")
    values.reshape(-1).view(np.uint8)[...] = NOBODYS
    return values
