"""Picks rows by the ids in them, in the order of the current stream, captured or not."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import cupy
import numpy as np

from lfm2kit_cuda.constants import PICKING
from lfm2kit_cuda.device import current_device, on_device
from lfm2kit_cuda.host_layout import MOST_ARRAYS
from lfm2kit_cuda.kernels import Kernel, load_kernel
from lfm2kit_cuda.upload import upload

BYTES = 4  # of an element
MOST_CTAS = 128  # each reads all ids before its rows; more would hardly copy faster


class Picker:
    """Picks the rows that have one of the wanted ids, on the current device."""

    def __init__(self, wanted: Collection[int]) -> None:
        self._device = current_device()
        table = np.zeros(max(wanted, default=-1) + 1, np.int32)
        table[list(wanted)] = 1
        self._is_wanted, self._known = upload(table), len(table)
        cupy.cuda.get_current_stream().synchronize()  # whatever stream it is called in first

    def __call__(self, arrays: Sequence[cupy.ndarray], ids: cupy.ndarray) -> Picked:
        """Return the rows of all arrays in which `ids`, int32 [rows, k], has a wanted id."""
        with on_device(self._device):
            arrays = [cupy.ascontiguousarray(array) for array in arrays]
            return self._picked(arrays, cupy.ascontiguousarray(ids))

    def _picked(self, arrays: Sequence[cupy.ndarray], ids: cupy.ndarray) -> Picked:
        rows, k = ids.shape
        picked = Picked(
            tuple(cupy.empty_like(array) for array in arrays),
            cupy.empty(1, np.int32),
            cupy.empty(rows, np.int32),
        )
        vector = _vector([*arrays, *picked.arrays])
        ctas = min(max(-(-rows // PICKING.ROWS), 1), MOST_CTAS)
        none = (None,) * (MOST_ARRAYS - len(arrays))
        words = [_row_bytes(array) // (BYTES * vector) for array in arrays]
        _kernel("pick_rows", vector)(
            (ctas,), PICKING.THREADS, ids, rows, k, self._is_wanted, self._known, *arrays, *none,
            *picked.arrays, *none, *words, *(0 for _ in none), picked.places, picked.count,
        )  # fmt: skip
        return picked


@dataclass(frozen=True, slots=True)
class Picked:
    """Some rows of arrays, one behind the other; see `lfm2kit.crossing.Picked`."""

    arrays: tuple[cupy.ndarray, ...]
    count: cupy.ndarray  # int32 [1]
    places: cupy.ndarray  # int32 [rows]: where each row is among those picked; -1: it is not

    def put_back(self, array: cupy.ndarray) -> cupy.ndarray:
        """Return an array of rows picked with each where it was, and zeros elsewhere."""
        with on_device(array.device.id):
            rows = cupy.empty(array.shape, array.dtype)
            vector = _vector([array, rows])
            words = _row_bytes(array) // (BYTES * vector)
            _kernel("put_back", vector)(
                (len(array),), PICKING.THREADS, array, self.places, rows, words
            )
        return rows


def _kernel(name: str, vector: int) -> Kernel:
    return load_kernel("picking", name, VECTOR=vector)


def _vector(arrays: Sequence[cupy.ndarray]) -> int:
    """Return how many elements can be copied at once: 4, or 1."""
    size = 4 * BYTES
    return 4 if all(_row_bytes(a) % size == a.data.ptr % size == 0 for a in arrays) else 1


def _row_bytes(array: cupy.ndarray) -> int:
    return int(np.prod(array.shape[1:], dtype=np.int64)) * int(array.dtype.itemsize)
