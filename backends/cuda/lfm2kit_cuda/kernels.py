"""Kernels that can be launched: compiled for a device, loaded once, called with Python values."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from threading import Lock
from typing import Any

import cupy
from cupy.cuda import driver
from cupy.cuda.function import Function, Module

from lfm2kit_cuda.compiling import architecture_name, compile_source, waits_for_previous
from lfm2kit_cuda.device import compute_capability, current_device
from lfm2kit_cuda.launching import Launch

SHARED_BYTES_ATTRIBUTE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
SHARED_BYTES_BY_DEFAULT = 48 * 1024
EARLY_CAPABILITY = (9, 0)
EARLY_IN_GRAPHS = 12030  # the driver from which on such launches can be captured: CUDA 12.3

Constants = tuple[tuple[str, int | str], ...]

_loading = Lock()


class Kernel:
    """A kernel that is loaded: called with its grid, the threads of a CTA, and its arguments.

    Arguments are arrays, None for null, and int and float, which the kernel gets with 32 bits.  The
    kernel runs in CuPy's current stream.  If a size of the grid is 0, nothing is launched.
    """

    def __init__(self, function: Function, shared_bytes: int = 0, *, early: bool = False) -> None:
        if shared_bytes > SHARED_BYTES_BY_DEFAULT:
            _allow(function, shared_bytes)
        self._function = function  # keeps the module loaded
        self._launch = Launch(function.ptr, shared_bytes, early=early)

    def __call__(self, grid: Sequence[int], threads: int, *arguments: Any) -> None:
        if 0 in grid:
            return
        status = self._launch(grid, threads, arguments, cupy.cuda.get_current_stream().ptr)
        if status:
            raise driver.CUDADriverError(status)


def load_kernel(stem: str, name: str, shared_bytes: int = 0, **constants: int | str) -> Kernel:
    """Return the kernel `name` of `{stem}.cu`, compiled with these constants.

    It is loaded for the device that is current, and runs on no other.
    """
    return _loaded(current_device(), stem, name, shared_bytes, tuple(sorted(constants.items())))


@cache
def _loaded(device: int, stem: str, name: str, shared_bytes: int, constants: Constants) -> Kernel:
    with _loading:
        function = _module(device, stem, constants).get_function(name)
        early = waits_for_previous(stem) and can_launch_early()
        return Kernel(function, shared_bytes, early=early)


def _allow(function: Function, shared_bytes: int) -> None:
    """Let launches of this function take this many bytes; others may take no fewer than before."""
    if shared_bytes > driver.funcGetAttribute(SHARED_BYTES_ATTRIBUTE, function.ptr):
        driver.funcSetAttribute(function.ptr, SHARED_BYTES_ATTRIBUTE, shared_bytes)


@cache
def _module(device: int, stem: str, constants: Constants) -> Module:
    architecture = architecture_name(*compute_capability())
    module = Module()
    module.load(compile_source(stem, architecture, dict(constants)))
    return module


def can_launch_early() -> bool:
    """Return whether the current device and its driver know early launches."""
    is_known: bool = cupy.cuda.runtime.driverGetVersion() >= EARLY_IN_GRAPHS
    return is_known and compute_capability() >= EARLY_CAPABILITY
