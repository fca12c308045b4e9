"""CuPy's names over NumPy arrays, for two devices whose streams work only when somebody waits.

So a buffer that is filled again before it has been read, and an array that is read before it is
made, show every time.  A stream that is `hasty` works at once instead, and makes those work that it
waits for.  `loaded` gives the modules of the backend on top of it.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np

from tests.conformance import late

DEVICES = 2
HOST_TO_DEVICE = 1
STREAMS: WeakValueDictionary[int, Stream] = WeakValueDictionary()  # by address
PACKAGES = ("cupy", "cupyx", "lfm2kit_cuda")


class _Thread(threading.local):
    """The current device of a thread, and for each device a stream."""

    def __init__(self) -> None:
        self.device = 0
        self.streams = [[LEGACY[device]] for device in range(DEVICES)]


class Stream(late.Stream):
    """A stream of the current device; what is added while it is captured is only recorded.

    It takes part in the capture of another stream once it waits for one of that capture's events.
    """

    def __init__(self, non_blocking: bool = False, device: int | None = None) -> None:
        super().__init__()
        self.device = THREAD.device if device is None else device
        self.is_hasty = False
        self.recorded: list[Callable[[], object] | Waits] | None = None
        self.branches: list[Stream] = []  # that take part in a capture which began here
        self.origin = self
        self.ptr = id(self)
        STREAMS[self.ptr] = self

    def add(self, work: Callable[[], object]) -> int:
        if self.recorded is not None:
            self.recorded.append(work)
            return len(self.recorded)
        place = super().add(work)
        if self.is_hasty:
            self.run(place)
        return place

    def synchronize(self) -> None:
        assert self.recorded is None, "a captured stream is waited for"
        self.run(len(self.work))

    def wait_event(self, event: Event) -> None:
        if event.stream is None:
            return
        stream, place = event.stream, event.place
        if event.is_captured:
            assert stream.recorded is not None, "a stream waits for a capture that has ended"
            self._join(stream.origin)
            assert self.recorded is not None
            self.recorded.append(Waits(stream, place))
        else:
            assert self.recorded is None, "a captured stream waits for what is not captured"
            self.add(lambda: stream.run(place))

    def _join(self, origin: Stream) -> None:
        if self.recorded is None:
            self.recorded, self.origin = [], origin
            origin.branches.append(self)
        assert self.origin is origin, "two captures wait for each other"

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
        assert self.recorded is not None
        recorded = {stream: stream.recorded or [] for stream in (self, *self.branches)}
        awaited = {w.stream: w.place for w in self.recorded if isinstance(w, Waits)}
        for branch in self.branches:
            assert awaited.get(branch, 0) == len(recorded[branch]), "a branch is never joined"
        for stream in recorded:
            stream.recorded, stream.branches, stream.origin = None, [], stream
        return SimpleNamespace(
            launch=lambda stream: stream.add(lambda: _run_graph(self, recorded)),
            upload=lambda stream: None,
        )


class Waits(NamedTuple):
    """A place in another stream that a captured one waits for."""

    stream: Stream
    place: int


def _run_graph(origin: Stream, recorded: Mapping[Stream, Sequence[Any]]) -> None:
    """Run what was captured: hasty streams as early as they may, the others as late."""
    twins = {stream: late.Stream() for stream in recorded}
    for stream, works in recorded.items():
        for work in works:
            waited = (
                partial(twins[work.stream].run, work.place) if isinstance(work, Waits) else work
            )
            twins[stream].add(waited)
    for stream in sorted(recorded, key=lambda stream: not stream.is_hasty):
        if stream.is_hasty or stream is origin:
            twins[stream].run(len(recorded[stream]))


class Event:
    def __init__(self, disable_timing: bool = False) -> None:
        self.device = THREAD.device
        self.stream: Stream | None = None
        self.place = 0
        self.is_captured = False
        self.seconds = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or current_stream()
        assert self.stream.device == self.device, "an event of another device"
        self.is_captured = self.stream.recorded is not None
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
        self.size = values.size
        self.device = THREAD.device
        self.data = self
        self.ptr = values.ctypes.data

    def __len__(self) -> int:
        return len(self.values)

    def __add__(self, nbytes: int) -> Array:
        """Return the memory from a byte on."""
        return Array(self.values.reshape(-1).view(np.uint8)[nbytes:])

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
        stream = stream or current_stream()
        assert stream.recorded is None, "CuPy refuses copies from the host in a capture"
        stream.add(partial(ctypes.memmove, self.ptr, address, nbytes))

    def copy_from_device_async(self, source: Array, nbytes: int, stream: Stream) -> None:
        assert THREAD.device == self.device == source.device, "an array of another device"
        stream.add(partial(ctypes.memmove, self.ptr, source.ptr, nbytes))

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


def zeros(shape: Any, dtype: Any) -> Array:
    array = empty(shape, dtype)
    array.enqueue(lambda: array.values.fill(0))
    return array


def copy_async(target: int, source: int, nbytes: int, kind: int, stream: int) -> None:
    """Copy as `cudaMemcpyAsync` does, in a stream that is given by its address."""
    assert kind == HOST_TO_DEVICE
    STREAMS[stream].add(partial(ctypes.memmove, target, source, nbytes))


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
        hostAllocPortable=1,
        memcpyHostToDevice=HOST_TO_DEVICE,
        memcpyAsync=copy_async,
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
        PinnedMemory=lambda nbytes, flags: np.full(nbytes, 0xA5, np.uint8),
        PinnedMemoryPointer=lambda memory, offset: memory[offset:],
        using_allocator=lambda allocator: nullcontext(),
    )
    cupy, cupyx = ModuleType("cupy"), ModuleType("cupyx")
    vars(cupy).update(
        cuda=cuda, ndarray=Array, empty=empty, zeros=zeros, ascontiguousarray=lambda a: a,
        uint8=np.uint8, uint16=np.uint16, int32=np.int32, float32=np.float32,
    )  # fmt: skip
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
