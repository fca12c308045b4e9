"""A device's memory, as the core sees it: copies to and from the host, and the order of work."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import cupy
import cupyx
import numpy as np
import numpy.typing as npt
from cupy.cuda import driver

from lfm2kit.memory import Arriving, Mark
from lfm2kit.transport import ExchangeOffer, Transport
from lfm2kit_cuda.channel import Channel
from lfm2kit_cuda.choosing import identity
from lfm2kit_cuda.device import current_device, on_device
from lfm2kit_cuda.meeting import Meeting
from lfm2kit_cuda.near import cores_near
from lfm2kit_cuda.picking import Picker
from lfm2kit_cuda.sums import add
from lfm2kit_cuda.upload import upload

EXTERNAL = 1  # CU_EVENT_RECORD_EXTERNAL: a captured event is recorded by each launch of the graph
SHARED = "LFM2KIT_CUDA_SHARED"  # set: several ranks may use one GPU, for tests of the exchange


class CudaMemory:
    """One device's memory: arrays are `cupy.ndarray`s of that device, in any thread.

    The memory's current stream is CuPy's current stream of the thread and the device.
    """

    def __init__(self, device: int) -> None:
        self.device = device
        self.name = f"lfm2kit_cuda:{device}"
        self._idle: list[cupy.cuda.Stream] = []  # appended to and popped from by any thread
        self._meetings: dict[int, Meeting] = {}  # by the id of their transport, which they keep

    def unit(self) -> str:
        """Return the GPU's name and UUID; with `LFM2KIT_CUDA_SHARED` also this process's number."""
        shared = f", shared by process {os.getpid()}" if os.environ.get(SHARED) else ""
        return f"the GPU {identity(self.device)}{shared}"

    def from_host(self, array: npt.NDArray[Any]) -> cupy.ndarray:
        """Return a copy of a host array; it is complete in the order of the current stream."""
        with on_device(self.device):
            return upload(array)

    def to_host(self, array: cupy.ndarray) -> npt.NDArray[Any]:
        return self.start_to_host(array).wait()

    def start_to_host(self, array: cupy.ndarray) -> Arriving:
        with on_device(self.device):
            return _Copy(array)

    def free_bytes(self) -> int:
        """Return the bytes that the driver has left, and those that CuPy's pool holds for later."""
        with on_device(self.device):
            free, _ = cupy.cuda.runtime.memGetInfo()
            return int(free) + int(cupy.get_default_memory_pool().free_bytes())

    def add(self, left: cupy.ndarray, right: cupy.ndarray) -> cupy.ndarray:
        with on_device(self.device):
            return add(left, right)

    def picker(self, wanted: Collection[int]) -> Picker:
        """Return what picks the rows that have one of these ids."""
        with on_device(self.device):
            return Picker(wanted)

    def near_cores(self) -> frozenset[int]:
        """Return the cores of the NUMA node that the GPU is attached to."""
        return cores_near(cupy.cuda.Device(self.device).pci_bus_id)

    def exchange_over(self, transport: Transport) -> ExchangeOffer:
        """Return the exchange through GPUs' memory among the ranks of a transport."""
        if id(transport) not in self._meetings:
            self._meetings[id(transport)] = Meeting(self.device, transport)
        return self._meetings[id(transport)].offer(self)

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Make a stream current that no other thread uses meanwhile.

        Streams are used again, because CuPy keeps free memory apart for each.
        """
        with on_device(self.device):
            before = cupy.cuda.get_current_stream()
            stream = self._idle_stream()
            try:
                with stream:
                    yield
            except BaseException:
                stream.synchronize()  # what was enqueued must not run beside the next user's work
                raise
            finally:
                before.use()  # CuPy's own `with` forgets a stream that was chosen by `use`
                self._idle.append(stream)

    def mark(self) -> Mark:
        with on_device(self.device):
            return _Event()

    def timed_mark(self) -> Mark:
        with on_device(self.device):
            return _TimedEvent()

    def wait(self, mark: Mark) -> None:
        assert isinstance(mark, _Event), "a mark of another memory"
        with on_device(self.device):
            mark.hold_back(cupy.cuda.get_current_stream())

    def channel(self, workers: int, deadline: float) -> Channel:
        """Return a new channel to threads of the host.

        Raise ValueError if there are more of them than a kernel can look at.
        """
        with on_device(self.device):
            return Channel(workers, deadline)

    def _idle_stream(self) -> cupy.cuda.Stream:
        with suppress(IndexError):
            return self._idle.pop()
        return cupy.cuda.Stream(non_blocking=True)


class _Event:
    """A place in the current stream."""

    def __init__(self) -> None:
        self._device = current_device()
        self._stream = cupy.cuda.get_current_stream()
        self._event = cupy.cuda.Event()
        self._record()

    def _record(self) -> None:
        self._event.record(self._stream)

    def seconds_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, _Event), "a mark of another memory"
        for mark in (earlier, self):
            _wait_for(mark._event, mark._device)
        return float(cupy.cuda.get_elapsed_time(earlier._event, self._event)) / 1e3

    def hold_back(self, stream: cupy.cuda.Stream) -> None:
        """Make a stream of the current device wait for this.

        The mark's own stream is in order; asked to wait while it is captured, it would fail.
        """
        if stream != self._stream or current_device() != self._device:
            stream.wait_event(self._event)


class _TimedEvent(_Event):
    """A place in the current stream, which is also told in replays if the stream is captured."""

    def _record(self) -> None:
        is_captured = self._stream.is_capturing()
        flags = EXTERNAL if is_captured else 0
        status = _record_with_flags()(self._event.ptr, self._stream.ptr, flags)
        if status:
            raise driver.CUDADriverError(status)


class _Copy:
    """A copy on its way into pinned memory, which the device writes at the link's speed.

    Neither the array nor the pinned memory is used for something else while the copy is under way,
    even if nobody keeps or waits for this object.
    """

    def __init__(self, array: cupy.ndarray) -> None:
        source = cupy.ascontiguousarray(array)
        self._host: npt.NDArray[Any] = _empty_pinned(source.shape, source.dtype)
        source.data.copy_to_host_async(self._host.ctypes.data, source.nbytes)
        self._device = current_device()
        self._arrived = cupy.cuda.Event(disable_timing=True)
        self._arrived.record()
        kept = source, self._host
        self._release = weakref.finalize(self, _wait_for, self._arrived, self._device, *kept)

    def wait(self) -> npt.NDArray[Any]:
        _wait_for(self._arrived, self._device)
        self._release()
        return self._host


def _empty_pinned(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return a new host array in pinned memory; one without elements is not pinned."""
    has_elements = 0 not in shape
    return cupyx.empty_pinned(shape, dtype) if has_elements else np.empty(shape, dtype)


def _wait_for(event: cupy.cuda.Event, device: int, *kept: Any) -> None:
    """Wait for an event of a device; what is kept is kept until then."""
    with on_device(device):
        event.synchronize()


@cache
def _record_with_flags() -> Any:
    record = ctypes.CDLL("libcuda.so.1").cuEventRecordWithFlags
    record.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint)
    return record


@cache
def memory_of(device: int) -> CudaMemory:
    """Return the memory of a device, always the same."""
    return CudaMemory(device)
