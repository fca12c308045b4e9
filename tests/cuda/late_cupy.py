"""CuPy's names over NumPy arrays, for two devices whose streams work only when somebody waits.

So a buffer that is filled again before it has been read, and an array that is read before it is
made, show every time.  `loaded` gives the modules of the backend on top of it.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from tests.conformance import late

DEVICES = 2
PACKAGES = ("cupy", "cupyx", "lfm2kit_cuda")


class _Thread(threading.local):
    """The current device of a thread, and for each device a stream."""

    def __init__(self) -> None:
        self.device = 0
        self.streams = [[LEGACY[device]] for device in range(DEVICES)]


class Stream(late.Stream):
    """A stream of the current device; what is added while it is captured is only recorded."""

    def __init__(self, non_blocking: bool = False, device: int | None = None) -> None:
        super().__init__()
        self.device = THREAD.device if device is None else device
        self.recorded: list[Callable[[], object]] | None = None

    def add(self, work: Callable[[], object]) -> int:
        if self.recorded is None:
            return super().add(work)
        self.recorded.append(work)
        return -1

    def synchronize(self) -> None:
        assert self.recorded is None, "a captured stream is waited for"
        self.run(len(self.work))

    def wait_event(self, event: Event) -> None:
        assert self.recorded is None, "a captured stream waits for what is not captured"
        if event.stream is not None:
            stream, place = event.stream, event.place
            self.add(lambda: stream.run(place))

    def use(self) -> None:
        assert THREAD.device == self.device, "a stream of another device"
        THREAD.streams[self.device][-1] = self

    def __enter__(self) -> Stream:
        THREAD.streams[self.device].append(self)
        self.use()
        return self

    def __exit__(self, *error: object) -> None:
        """Return to the stream before, or to the legacy one if that was chosen by `use`."""
        streams = THREAD.streams[self.device]
        streams.pop()
        if len(streams) == 1:
            streams[0] = LEGACY[self.device]

    def begin_capture(self, mode: int) -> None:
        self.recorded = []

    def end_capture(self) -> Any:
        recorded, self.recorded = self.recorded or [], None
        return SimpleNamespace(
            launch=lambda stream: [stream.add(work) for work in recorded],
            upload=lambda stream: None,
        )


class Event:
    def __init__(self, disable_timing: bool = False) -> None:
        self.device = THREAD.device
        self.stream: Stream | None = None
        self.place = 0
        self.seconds = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or current_stream()
        assert self.stream.device == self.device, "an event of another device"
        self.place = self.stream.add(self._reach)

    def synchronize(self) -> None:
        assert THREAD.device == self.device, "a thread that waits takes memory of its own device"
        if self.stream is not None:
            self.stream.run(self.place)

    def _reach(self) -> None:
        self.seconds = time.perf_counter()


class Array:
    """An array on a device; `data` is itself, for what CuPy says of an array's memory."""

    def __init__(self, values: Any) -> None:
        self.values = values
        self.shape, self.dtype, self.nbytes = values.shape, values.dtype, values.nbytes
        self.device = THREAD.device
        self.data = self

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, part: slice) -> Array:
        return Array(self.values[part])

    def reshape(self, *shape: int) -> Array:
        return Array(self.values.reshape(*shape))

    def view(self, dtype: Any) -> Array:
        return Array(self.values.view(dtype))

    def copy(self) -> Array:
        copy = empty(self.shape, self.dtype)
        self.enqueue(lambda: np.copyto(copy.values, self.values))
        return copy

    def copy_from_host_async(self, address: int, nbytes: int, stream: Stream | None = None) -> None:
        assert THREAD.device == self.device, "an array of another device"
        work = partial(ctypes.memmove, self.values.ctypes.data, address, nbytes)
        (stream or current_stream()).add(work)

    def copy_to_host_async(self, address: int, nbytes: int) -> None:
        self.enqueue(lambda: ctypes.memmove(address, self.values.ctypes.data, nbytes))

    def enqueue(self, work: Callable[[], object]) -> None:
        assert THREAD.device == self.device, "an array of another device"
        current_stream().add(work)


class Device:
    """A device: the first one is a Hopper, the second an Ampere."""

    def __init__(self, device: int) -> None:
        self.compute_capability = ("90", "80")[device]
        self.attributes = {
            "MultiProcessorCount": (132, 108)[device],
            "MaxSharedMemoryPerBlockOptin": (227, 163)[device] << 10,
        }


class Module:
    """A module of machine code on the device that was current when it was loaded."""

    def load(self, code: bytes) -> None:
        self.device = THREAD.device

    def get_function(self, name: str) -> Any:
        return SimpleNamespace(ptr=self.device)


def current_stream() -> Stream:
    return THREAD.streams[THREAD.device][-1]


def empty(shape: Any, dtype: Any) -> Array:
    """Return an array that is full of something else."""
    values = np.empty(shape, dtype)
    values.reshape(-1).view(np.uint8).fill(0xA5)
    return Array(values)


LEGACY = [Stream(device=device) for device in range(DEVICES)]
THREAD = _Thread()


def _modules() -> dict[str, Any]:
    def set_device(device: int) -> None:
        THREAD.device = device

    runtime = SimpleNamespace(
        getDevice=lambda: THREAD.device,
        setDevice=set_device,
        getDeviceCount=lambda: DEVICES,
        driverGetVersion=lambda: 13000,
        streamCaptureModeRelaxed=2,
        CUDARuntimeError=RuntimeError,
    )
    pool = SimpleNamespace(malloc=None, total_bytes=lambda: 0, free_all_blocks=lambda: None)
    cuda = ModuleType("cupy.cuda")
    vars(cuda).update(
        runtime=runtime,
        Stream=Stream,
        Event=Event,
        Device=Device,
        driver=SimpleNamespace(),
        get_current_stream=current_stream,
        get_elapsed_time=lambda a, b: 1e3 * (b.seconds - a.seconds),
        MemoryPool=lambda: pool,
        using_allocator=lambda allocator: nullcontext(),
    )
    cupy, cupyx = ModuleType("cupy"), ModuleType("cupyx")
    vars(cupy).update(
        cuda=cuda, ndarray=Array, empty=empty, ascontiguousarray=lambda a: a, uint8=np.uint8
    )
    vars(cupyx).update(empty_pinned=np.empty)
    function = ModuleType("cupy.cuda.function")
    vars(function).update(Function=SimpleNamespace, Module=Module)
    return {"cupy": cupy, "cupy.cuda": cuda, "cupy.cuda.function": function, "cupyx": cupyx}


@contextmanager
def loaded(*names: str) -> Iterator[tuple[Any, ...]]:
    """Give modules of the backend, imported anew on this CuPy; afterwards the former are back."""
    before = {name: sys.modules[name] for name in list(sys.modules) if _is_ours(name)}
    for name in before:
        del sys.modules[name]
    sys.modules.update(_modules())
    try:
        yield tuple(import_module(f"lfm2kit_cuda.{name}") for name in names)
    finally:
        for name in [name for name in sys.modules if _is_ours(name)]:
            del sys.modules[name]
        sys.modules.update(before)


def _is_ours(name: str) -> bool:
    return name.partition(".")[0] in PACKAGES
