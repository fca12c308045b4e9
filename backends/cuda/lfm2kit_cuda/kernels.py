"""Kernels that can be launched: compiled for the device, loaded once, called with Python values."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from cupy.cuda import driver
from cupy.cuda.function import Function, Module

from lfm2kit_cuda.compiling import architecture_name, compile_source, waits_for_previous
from lfm2kit_cuda.device import compute_capability
from lfm2kit_cuda.launching import Launch, can_launch_early

SHARED_BYTES_ATTRIBUTE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
SHARED_BYTES_BY_DEFAULT = 48 * 1024


class Kernel:
    """Called with grid, block and arguments: arrays, None for null, int and float as 32 bits.

    A grid with nothing in it launches nothing.
    """

    def __init__(self, function: Function, shared_bytes: int = 0, *, early: bool = False) -> None:
        if shared_bytes > SHARED_BYTES_BY_DEFAULT:
            driver.funcSetAttribute(function.ptr, SHARED_BYTES_ATTRIBUTE, shared_bytes)
        self._function = function  # keeps the module loaded
        self._launch = Launch(function.ptr, shared_bytes, early=early)

    def __call__(self, grid: Sequence[int], block: int, *arguments: Any) -> None:
        if 0 not in grid:
            self._launch(grid, block, arguments)


@cache
def load_kernel(stem: str, name: str, shared_bytes: int = 0, **constants: int | str) -> Kernel:
    """The kernel `name` of `{stem}.cu`, compiled with these constants for the current device."""
    module = _module(stem, tuple(sorted(constants.items())))
    early = waits_for_previous(stem) and can_launch_early()
    return Kernel(module.get_function(name), shared_bytes, early=early)


@cache
def _module(stem: str, constants: tuple[tuple[str, int | str], ...]) -> Module:
    architecture = architecture_name(*compute_capability())
    module = Module()
    module.load(compile_source(stem, architecture, dict(constants)))
    return module
