"""Kernels that can be launched: compiled for the device, loaded once, called with Python values."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from cupy.cuda import driver
from cupy.cuda.function import Function, Module

from lfm2kit_cuda.compiling import architecture_name, compile_source
from lfm2kit_cuda.device import compute_capability

SHARED_BYTES_ATTRIBUTE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
SHARED_BYTES_BY_DEFAULT = 48 * 1024


class Kernel:
    """Called with grid, block and arguments: arrays, None for null, int and float as 32 bits.

    A grid with nothing in it launches nothing.
    """

    def __init__(self, function: Function, shared_bytes: int = 0) -> None:
        self._function = function
        self._shared_bytes = shared_bytes
        if shared_bytes > SHARED_BYTES_BY_DEFAULT:
            driver.funcSetAttribute(function.ptr, SHARED_BYTES_ATTRIBUTE, shared_bytes)

    def __call__(self, grid: Sequence[int], block: int, *arguments: Any) -> None:
        if 0 in grid:
            return
        values = tuple(_argument(a) for a in arguments)
        self._function(tuple(grid), (block,), values, shared_mem=self._shared_bytes)


@cache
def load_kernel(stem: str, name: str, shared_bytes: int = 0, **constants: int | str) -> Kernel:
    """The kernel `name` of `{stem}.cu`, compiled with these constants for the current device."""
    module = _module(stem, tuple(sorted(constants.items())))
    return Kernel(module.get_function(name), shared_bytes)


@cache
def _module(stem: str, constants: tuple[tuple[str, int | str], ...]) -> Module:
    architecture = architecture_name(*compute_capability())
    module = Module()
    module.load(compile_source(stem, architecture, dict(constants)))
    return module


def _argument(value: Any) -> Any:
    if value is None:
        return np.uint64(0)
    if isinstance(value, int):
        return np.int32(value)
    if isinstance(value, float):
        return np.float32(value)
    return value
