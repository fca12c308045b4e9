"""Launches through the driver's cuLaunchKernelEx: CuPy's own launch takes no attributes."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from functools import cache
from typing import Any

import cupy
from cupy.cuda import driver

from lfm2kit_cuda.device import compute_capability

EARLY_ATTRIBUTE = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
EARLY_CAPABILITY = (9, 0)
EARLY_IN_GRAPHS = 12030  # the driver from which on such launches can be captured: CUDA 12.3


class _Attribute(ctypes.Structure):
    _fields_ = (
        ("id", ctypes.c_uint),
        ("padding", ctypes.c_uint),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_byte * 60),
    )


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


_EARLY = _Attribute(id=EARLY_ATTRIBUTE, value=1)


class Launch:
    """One kernel's launches; the types of its arguments are those of the first call.

    An `early` one may place its blocks before the kernel ahead of it in the stream has ended.
    """

    def __init__(self, function: int, shared_bytes: int, *, early: bool) -> None:
        self._function = ctypes.c_void_p(function)
        self._config = _Config(shared_bytes=shared_bytes)
        if early:
            self._config.attributes, self._config.count = ctypes.pointer(_EARLY), 1
        self._values: _Values | None = None

    def __call__(self, grid: Sequence[int], block: int, arguments: Sequence[Any]) -> None:
        if self._values is None:
            self._values = _Values(arguments)
        self._values.set(arguments)
        config = self._config
        config.grid[:] = (*grid, 1, 1)[:3]
        config.block[:] = (block, 1, 1)
        config.stream = cupy.cuda.get_current_stream().ptr
        status = _launch()(ctypes.byref(config), self._function, self._values.pointers, None)
        if status:
            raise driver.CUDADriverError(status)


class _Values:
    """Room for a kernel's arguments, and the pointers to them that the driver reads."""

    def __init__(self, arguments: Sequence[Any]) -> None:
        codes = "".join(map(_code, arguments))
        self._format = struct.Struct(codes)
        self._room = ctypes.create_string_buffer(max(self._format.size, 1))
        begin = ctypes.addressof(self._room)
        ends = [struct.calcsize(codes[: i + 1]) for i in range(len(codes))]
        starts = [
            begin + end - struct.calcsize(code) for end, code in zip(ends, codes, strict=True)
        ]
        self.pointers = (ctypes.c_void_p * len(codes))(*starts)

    def set(self, arguments: Sequence[Any]) -> None:
        self._format.pack_into(self._room, 0, *map(_value, arguments))


def _code(argument: Any) -> str:
    """Of `struct`: arrays and None are addresses, int and float have 32 bits."""
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


@cache
def _launch() -> Any:
    launch = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
    launch.argtypes = (ctypes.c_void_p,) * 4
    return launch


@cache
def can_launch_early() -> bool:
    """Whether this GPU and its driver know early launches; elsewhere kernels start in turn."""
    is_known: bool = cupy.cuda.runtime.driverGetVersion() >= EARLY_IN_GRAPHS
    return is_known and compute_capability() >= EARLY_CAPABILITY
