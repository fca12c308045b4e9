"""The GPU that this process works on."""

from __future__ import annotations

from functools import cache

import cupy

from lfm2kit.backend import Context
from lfm2kit.errors import Lfm2kitError, Option


def choose_device(context: Context) -> None:
    """Makes the GPU of this rank the current one; two ranks of a machine never share one."""
    count = cupy.cuda.runtime.getDeviceCount()
    if context.local_ranks > count:
        raise Lfm2kitError(
            f"{context.local_ranks} ranks on this machine, but {count} CUDA "
            f"device{'s' if count > 1 else ''}; try ",
            Option("ranks", count),
        )
    if context.local_ranks > 1:
        cupy.cuda.Device(context.local_rank).use()


@cache
def compute_capability() -> tuple[int, int]:
    """(9, 0) for Hopper."""
    text = cupy.cuda.Device().compute_capability
    return int(text[:-1]), int(text[-1])


@cache
def processors() -> int:
    """How many multiprocessors the device has."""
    return int(cupy.cuda.Device().attributes["MultiProcessorCount"])


@cache
def most_shared_bytes() -> int:
    """Of shared memory that a block can have."""
    return int(cupy.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"])


def name() -> str:
    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    return str(properties["name"].decode())
