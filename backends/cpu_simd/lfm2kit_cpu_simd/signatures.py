"""The Numba types of kernel arguments.  What a kernel only reads may be a read-only array."""

from __future__ import annotations

from numba import types


def _read(element: types.Type, ndim: int) -> types.Array:
    return types.Array(element, ndim, "C", readonly=True)


INT, FLOAT, BOOL, WORD = types.int64, types.float32, types.boolean, types.uint16

VECTOR = _read(types.float32, 1)
ROWS = _read(types.float32, 2)
IDS = _read(types.int32, 1)
IDS_2D = _read(types.int32, 2)
OFFSETS = ORDER = _read(types.int64, 1)
PLACES = TABLE = _read(types.int64, 2)

ROWS_OUT = types.float32[:, ::1]
STATE_OUT = types.float32[:, :, ::1]
IDS_OUT = types.int32[:, ::1]
INDICES_OUT = types.int64[::1]
PLACES_OUT = types.int64[:, ::1]
