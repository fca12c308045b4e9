"""Launches through the driver's cuLaunchKernelEx: CuPy's own launch takes no attributes."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

from lfm2kit_cuda.arguments import Arguments

MOST_CTAS = 65535  # of a grid in y, and in z; in x there may be 2^31 - 1
EARLY_ATTRIBUTE = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


def in_layers(count: int) -> tuple[int, int]:
    """Return a grid's y and layers in z that have `count` CTAs together, or a few more.

    For what grows with a batch, where x is taken; kernels count them with layers.cuh.
    """
    layers = max(1, -(-count // MOST_CTAS))
    return -(-count // layers), layers


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


class _Buffers(threading.local):
    """The memory from which the driver reads a launch.

    Each thread has its own: while the driver reads, other threads run and launch, too.
    """

    def __init__(self, shared_bytes: int, early: bool) -> None:
        self.config = _Config(shared_bytes=shared_bytes)
        if early:
            self.config.attributes, self.config.count = ctypes.pointer(_EARLY), 1
        self.arguments: Arguments | None = None


class Launch:
    """The launches of one kernel, from any thread, with the same types of arguments each time.

    An `early` kernel may place its CTAs before the kernel ahead of it in the stream has ended.
    """

    def __init__(self, function: int, shared_bytes: int, *, early: bool) -> None:
        self._function = ctypes.c_void_p(function)
        self._buffers = _Buffers(shared_bytes, early)

    def __call__(
        self, grid: Sequence[int], threads: int, values: Sequence[Any], stream: int
    ) -> int:
        """Launch the kernel in a stream, and return the driver's status: 0 for success."""
        buffers = self._buffers
        if buffers.arguments is None:
            buffers.arguments = Arguments(values)
        buffers.arguments.set(values)
        config = buffers.config
        config.grid[:] = (*grid, 1, 1)[:3]
        config.block[:] = (threads, 1, 1)
        config.stream = stream
        pointers = buffers.arguments.pointers
        status: int = _driver_launch()(ctypes.byref(config), self._function, pointers, None)
        return status


@cache
def _driver_launch() -> Any:
    launch = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
    launch.argtypes = (ctypes.c_void_p,) * 4
    return launch
