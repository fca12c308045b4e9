"""The arguments of a kernel as the driver reads them: their values, and pointers to these."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import Any


class Arguments:
    """The memory for the arguments of one kernel; their types are those of the first ones.

    Arrays and None are addresses, int and float have 32 bits.
    """

    def __init__(self, first: Sequence[Any]) -> None:
        codes = "".join(map(_code, first))
        self._format = struct.Struct(codes)
        self._memory = ctypes.create_string_buffer(max(self._format.size, 1))
        begin = ctypes.addressof(self._memory)
        ends = [struct.calcsize(codes[: i + 1]) for i in range(len(codes))]
        starts = [
            begin + end - struct.calcsize(code) for end, code in zip(ends, codes, strict=True)
        ]
        self.pointers = (ctypes.c_void_p * len(codes))(*starts)

    def set(self, values: Sequence[Any]) -> None:
        """Write the values to where the pointers lead."""
        self._format.pack_into(self._memory, 0, *map(_value, values))


def _code(argument: Any) -> str:
    """Return the letter that `struct` has for the argument's type."""
    if isinstance(argument, int):
        return "i"
    return "f" if isinstance(argument, float) else "P"


def _value(argument: Any) -> int | float:
    if argument is None:
        return 0
    if isinstance(argument, (int, float)):
        return argument
    address: int = argument.data.ptr
    return address
