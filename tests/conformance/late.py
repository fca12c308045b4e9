"""A memory that works as late as it may: only when the host waits for a result.

So whoever reads an array too early finds nothing in it, every time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from lfm2kit.backend import HOST, Batch, Block, Memory, Spec, Weights
from lfm2kit.batch_rules import ARRAYS
from lfm2kit.building.results import RETURNED
from lfm2kit.memory import Arriving, Mark
from lfm2kit.reference.backend import ReferenceBackend

RUNNING = threading.RLock()


class Stream:
    """A queue of work that is done in order, up to where somebody waits."""

    def __init__(self) -> None:
        self.work: list[Callable[[], object]] = []
        self.done = 0

    def add(self, work: Callable[[], object]) -> int:
        """Enqueue work, and return the place after it."""
        self.work.append(work)
        return len(self.work)

    def run(self, place: int) -> None:
        with RUNNING:
            while self.done < place:
                self.done += 1
                self.work[self.done - 1]()


class Late:
    """An array without values until its stream has come to where it is made."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._values: Any = None

    @property
    def values(self) -> Any:
        if self._values is None:
            raise RuntimeError("an array is read before it is made")
        return self._values

    def make(self, values: Any) -> None:
        self._values = values


class Place:
    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.place = stream.add(self._reach)
        self.seconds = 0.0

    def _reach(self) -> None:
        self.seconds = time.perf_counter()

    def reach(self) -> None:
        self.stream.run(self.place)

    def seconds_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, Place)
        earlier.reach()
        self.reach()
        return self.seconds - earlier.seconds


class LateCopy:
    def __init__(self, stream: Stream, array: Late) -> None:
        self.stream = stream
        self.array = array
        self.host: Any = None
        self.place = stream.add(self.copy)

    def copy(self) -> None:
        self.host = self.array.values.copy()

    def wait(self) -> Any:
        self.stream.run(self.place)
        return self.host


class LateMemory:
    name = "tests_late"

    def __init__(self) -> None:
        self._local = threading.local()

    @property
    def current(self) -> Stream:
        if not hasattr(self._local, "streams"):
            self._local.streams = [Stream()]
        stream: Stream = self._local.streams[-1]
        return stream

    def from_host(self, array: Any) -> Late:
        late, copy = Late(array.shape), array.copy()
        self.current.add(lambda: late.make(copy))
        return late

    def to_host(self, array: Any) -> Any:
        return self.start_to_host(array).wait()

    @contextmanager
    def stream(self) -> Iterator[None]:
        assert self.current is not None
        self._local.streams.append(Stream())
        try:
            yield
        finally:
            self._local.streams.pop()

    def mark(self) -> Mark:
        return Place(self.current)

    def wait(self, mark: Mark) -> None:
        assert isinstance(mark, Place)
        if mark.stream is not self.current:
            self.current.add(mark.reach)

    def start_to_host(self, array: Late) -> Arriving:
        return LateCopy(self.current, array)


class LateBlock:
    """A block of the reference that works in the order of its memory's streams."""

    def __init__(self, block: Any, memory: LateMemory, spec: Spec) -> None:
        self.block = block
        self.memory = memory
        self.spec = spec
        if hasattr(block, "new_state"):
            self.new_state = block.new_state
            self.state_bytes = getattr(block, "state_bytes", None)

    def __call__(self, *inputs: Any) -> Any:
        returned = RETURNED[type(self.spec)]
        shape = returned.shape(self.spec, *inputs)
        made = tuple(Late(shape) for _ in returned.dtypes)

        def work() -> None:
            result = self.block(*map(_values, inputs))
            for late, values in zip(made, result if len(made) > 1 else (result,), strict=True):
                late.make(values)

        self.memory.current.add(work)
        return made if len(made) > 1 else made[0]


def _values(value: Any) -> Any:
    if isinstance(value, Batch):
        return value.unchecked(
            **{name: getattr(value, name).values for name in ARRAYS}, memory=HOST, copied=None
        )
    return value.values if isinstance(value, Late) else value


class LateBackend(ReferenceBackend):
    def __init__(self, memory: LateMemory | None = None) -> None:
        self.late = memory or LateMemory()

    def memory(self, spec: Spec) -> Memory:
        return self.late

    def build(self, spec: Spec, weights: Weights) -> Block:
        return LateBlock(super().build(spec, weights), self.late, spec)


# Memories that are wrong in one way each.


class WaitsForNothing(LateMemory):
    def wait(self, mark: Mark) -> None:
        pass


class MarksTooEarly(LateMemory):
    """A mark before the last work that was enqueued."""

    def mark(self) -> Mark:
        mark = Place(self.current)
        mark.place = max(0, mark.place - 2)
        return mark


class CopiesWhenAsked(LateMemory):
    """A copy of what the array has when the host waits, not when it was started."""

    def start_to_host(self, array: Late) -> Arriving:
        copy = LateCopy(self.current, array)

        def copy_now() -> Any:
            stream = self.current
            stream.run(len(stream.work))
            copy.copy()
            return copy.host

        copy.wait = copy_now  # type: ignore[method-assign]
        return copy


class CopiesIntoOneBuffer(LateMemory):
    """A second copy of the same shape overwrites the first."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: dict[Any, Any] = {}

    def start_to_host(self, array: Late) -> Arriving:
        copy = LateCopy(self.current, array)

        def into_buffer() -> None:
            buffer = self.buffers.setdefault(array.values.shape, np.empty_like(array.values))
            buffer[...] = array.values
            copy.host = buffer

        self.current.work[copy.place - 1] = into_buffer
        return copy


class MeasuresBackwards(LateMemory):
    """Marks that count the seconds from the later one to the earlier."""

    def mark(self) -> Mark:
        return BackwardsPlace(self.current)


class BackwardsPlace(Place):
    def seconds_since(self, earlier: Mark) -> float:
        return -super().seconds_since(earlier)


class SharesArguments(LateBackend):
    """Its blocks keep the arguments of a call in themselves, where another thread finds them."""

    def build(self, spec: Spec, weights: Weights) -> Block:
        block = super().build(spec, weights)
        kept: list[Any] = [()]

        def call(*inputs: Any) -> Any:
            kept[0] = inputs
            time.sleep(1e-4)
            return block(*kept[0])

        call.new_state = getattr(block, "new_state", None)  # type: ignore[attr-defined]
        call.state_bytes = getattr(block, "state_bytes", None)  # type: ignore[attr-defined]
        return call
