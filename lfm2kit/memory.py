"""The kinds of memory that arrays live in, and the way between them: always through the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol, TypeGuard, runtime_checkable

import numpy as np
import numpy.typing as npt

from lfm2kit.process.machine import free_memory

Array = Any  # numpy.ndarray in the host's memory, whatever a backend says in its own


class Memory(Protocol):
    """A memory space.  Two blocks whose memories have one name hand arrays over without a copy.

    Its methods may be called from any thread.
    """

    @property
    def name(self) -> str:
        """Return the name that `lfm2kit plan` shows: "host", or one like "lfm2kit_cuda:0".

        It begins with the name of the package that defines the memory.  So two packages whose
        arrays are of different types never share a name, even if both use the same device.
        """
        ...

    def from_host(self, array: npt.NDArray[Any]) -> Array:
        """Return a copy of a NumPy array in this memory, with the same dtype and shape."""
        ...

    def to_host(self, array: Array) -> npt.NDArray[Any]:
        """Return a NumPy array with the values of `array`, complete when this returns."""
        ...


@runtime_checkable
class Bounded(Protocol):
    """Capability: a memory that can say how much of it is left.

    A model whose blocks need more of it (see `MemoryFigures`) is refused before it is built.
    """

    @property
    def name(self) -> str: ...

    def free_bytes(self) -> int:
        """Return the bytes that blocks can still take."""
        ...


@runtime_checkable
class Adds(Protocol):
    """Capability of a memory in which the core can add arrays up.

    Where a layer's experts are split between several blocks, their results are added here.  In a
    memory without it they are copied to the host for that.
    """

    @property
    def name(self) -> str: ...

    def add(self, left: Array, right: Array) -> Array:
        """Return left + right, a new float32 array; both are float32 arrays of the same shape.

        In an ordered memory the work is enqueued in the current stream.
        """
        ...


class Mark(Protocol):
    """A place in the order of a memory's work, as `Ordered.mark` returns it."""

    def seconds_since(self, earlier: Mark) -> float:
        """Return the seconds from when the work reached `earlier` to when it reached this mark.

        Wait until it has reached both.  The clock is the memory's own.
        """
        ...


class Arriving(Protocol):
    """An array on its way to the host, as `Ordered.start_to_host` returns it."""

    def wait(self) -> npt.NDArray[Any]:
        """Return the NumPy array, complete; the same one whenever this is called."""
        ...


@runtime_checkable
class Ordered(Memory, Protocol):
    """Capability: a memory that works while the host goes on, as a GPU's does.

    Each thread has a current stream in this memory.  A block enqueues its work on the current
    stream, as do `from_host` and `to_host`, and the work of one stream is done in that order.  So a
    block need not wait for its inputs, and its results are ready for what is enqueued after it in
    the same stream.  Between two streams there is no order but that of `wait`.

    When an array is dropped, its memory serves the stream in which it was made again.  If another
    stream has used the array, keep a reference to it until that use is over: until a copy to the
    host that was started there afterwards has arrived, or until the array's own stream waits for a
    mark of the use.
    """

    def stream(self) -> AbstractContextManager[None]:
        """Make a stream current in this thread until the context is left.

        No other thread uses it meanwhile.  It does not wait for what was enqueued elsewhere before,
        and nothing waits for it when the context is left.
        """
        ...

    def mark(self) -> Mark:
        """Return a mark after everything that is enqueued in the current stream."""
        ...

    def wait(self, mark: Mark) -> None:
        """Let what is enqueued in the current stream from now on wait for `mark`.

        The host does not wait.  The mark may be of any stream and any thread.
        """
        ...

    def start_to_host(self, array: Array) -> Arriving:
        """Enqueue a copy of `array` to the host in the current stream.

        The copy belongs to the caller.  `array` may be dropped at once, and may be written by what
        is enqueued later.
        """
        ...


@runtime_checkable
class Timed(Protocol):
    """Capability of an ordered memory: marks that tell the time of captured work as well.

    With it `lfm2kit profile` looks into a captured forward.
    """

    def timed_mark(self) -> Mark:
        """Return a mark after all that is enqueued in the current stream, for `seconds_since` only.

        If a forward is being captured, each replay of it reaches the mark anew, and the mark tells
        of the newest replay that has ended.
        """
        ...


@runtime_checkable
class Exclusive(Protocol):
    """Capability: a memory that one rank of a job uses alone, as a GPU's.

    Ranks that would use the same one are refused before they start.
    """

    @property
    def name(self) -> str: ...

    def unit(self) -> str:
        """Return what `lfm2kit run` calls it: a name that nothing else has, on any machine."""
        ...


def is_ordered(memory: Memory) -> TypeGuard[Ordered]:
    """Return whether `memory` has streams; isinstance would take 15 us for a protocol."""
    return hasattr(memory, "start_to_host")


def arriving(memory: Memory, array: Array) -> Callable[[], npt.NDArray[Any]]:
    """Begin to copy an array to the host; return a function that waits for the copy.

    The copy has what the array holds now, whatever is enqueued or written afterwards.
    """
    if is_ordered(memory):
        return memory.start_to_host(array).wait
    copy = np.array(memory.to_host(array))
    return lambda: copy


@contextmanager
def own_stream(memory: Memory) -> Iterator[None]:
    """Make a stream current that goes on where the current one is, if `memory` has streams.

    After an exception, an interrupt included, it waits for what was enqueued: the next forward may
    run in another stream, and would find the same arrays still being written.
    """
    if not is_ordered(memory):
        yield
        return
    here = memory.mark()
    with memory.stream():
        memory.wait(here)
        try:
            yield
        except BaseException:
            with suppress(Exception):  # the first error says why
                memory.mark().seconds_since(here)
            raise


class HostMemory:
    """The process's own memory: NumPy arrays, handed over as they are."""

    name = "host"

    def from_host(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return array

    def to_host(self, array: Array) -> npt.NDArray[Any]:
        return np.asarray(array)

    def add(self, left: npt.NDArray[Any], right: npt.NDArray[Any]) -> npt.NDArray[Any]:
        total: npt.NDArray[Any] = left + right
        return total

    def free_bytes(self, ranks: int = 1) -> int:
        """Return the bytes that blocks can still take if `ranks` ranks share the machine.

        The smallest of what the machine, its control groups and `ulimit` have left.
        """
        return free_memory(ranks)


HOST = HostMemory()
