"""The GPUs: which one is current in a thread, and what each of them has.

CUDA's current device belongs to the thread.  Whatever may be called from any thread makes its own
device current first: a memory, a block (`blocks/on_device.py`), a replay.  Everything else here
works on the current device.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import cupy
from cupy.cuda import runtime

from lfm2kit.backend import Context
from lfm2kit_cuda.choosing import device_for


class _Bound(threading.local):
    """The devices whose contexts have been current in this thread."""

    def __init__(self) -> None:
        self.devices: set[int] = set()


_bound = _Bound()


def choose_device(context: Context) -> int:
    """Return the number of the device that this process works on.

    A rank's becomes the current one of this thread for good: to return to another device would take
    some of that one's memory.
    """
    device = device_for(context, runtime.getDeviceCount(), current_device())
    if context.local_ranks > 1:
        runtime.setDevice(device)
    return device


def current_device() -> int:
    """Return the number of the device that is current in this thread."""
    device: int = runtime.getDevice()
    return device


@contextmanager
def on_device(device: int) -> Iterator[None]:
    """Make a device current in this thread; afterwards the former one is current again."""
    before = current_device()
    if before != device or device not in _bound.devices:
        runtime.setDevice(device)  # also makes its context current, which a new thread lacks
        _bound.devices.add(device)
    try:
        yield
    finally:
        if before != device:
            runtime.setDevice(before)


def compute_capability() -> tuple[int, int]:
    """Return the current device's compute capability: (9, 0) for Hopper."""
    return _compute_capability(current_device())


def sm_count() -> int:
    """Return how many SMs the current device has."""
    return _attribute("MultiProcessorCount", current_device())


def most_shared_bytes() -> int:
    """Return how many bytes of shared memory a CTA of the current device can have."""
    return _attribute("MaxSharedMemoryPerBlockOptin", current_device())


def name() -> str:
    """Return the current device's name."""
    return str(runtime.getDeviceProperties(current_device())["name"].decode())


@cache
def _compute_capability(device: int) -> tuple[int, int]:
    text = cupy.cuda.Device(device).compute_capability
    return int(text[:-1]), int(text[-1])


@cache
def _attribute(attribute: str, device: int) -> int:
    return int(cupy.cuda.Device(device).attributes[attribute])
