"""The server of all crossings into the host's memory, and a crossing of one block."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import Any, NamedTuple, Protocol

from lfm2kit_cpu_simd.crew import CREW

from lfm2kit.backend import (
    Array,
    ArrayForm,
    Block,
    Call,
    CallsNatively,
    Ordered,
    Over,
    Pending,
    Picked,
    Picker,
    PicksRows,
    Signals,
    first_call,
)
from lfm2kit.errors import Lfm2kitError
from lfm2kit.progress import THIS_PROCESS
from lfm2kit_hybrid.calls import Called
from lfm2kit_hybrid.workers import Workers

# At least.  A row's choice takes some 10 ns, so this many take 0.6 us; fewer would not save what it
# costs to have one more core see the trip and one more answer looked at.
ROWS_OF_A_WORKER = 64

SMALLER = "try a smaller batch, or shorter samples"
Shapes = tuple[tuple[int, ...], ...]


class Outer(Ordered, Signals, Protocol):
    """The memory from which blocks are called."""


class Server:
    """Calls blocks of the host's memory for a memory with signals."""

    def __init__(
        self, memory: Outer, cores: Sequence[int | None], threads: int | None = None
    ) -> None:
        """Start no worker yet.  A block that needs Python computes on `threads` at the most."""
        self._memory = memory
        self._lock = Lock()  # one forward at a time
        self._thread: int | None = None  # the one that runs it, or has run the one before
        self._most = len(cores)
        self._channel = memory.channel(len(cores), THIS_PROCESS.deadline)
        self._workers = Workers(self._channel, cores, threads)
        # Weak: nobody waits for a trip of a forward, or of a recording, that has failed.
        self._newest: Callable[[], _Trip | None] = lambda: None
        weakref.finalize(self, self._workers.close).atexit = False  # they end themselves then

    @contextmanager
    def serving(self) -> Iterator[None]:
        if self._lock.locked() and self._thread == get_ident():
            raise Lfm2kitError(
                "a forward of this model runs in this thread already; call logits outside of "
                "running(), and not from a block"
            )
        with self._lock:
            try:
                self._thread = get_ident()
                self._workers.begin()
                yield from self._forward()
            finally:
                self._workers.end()
            self._workers.check()

    def _forward(self) -> Iterator[None]:
        """Yield once; what is raised meanwhile ends the forward for the memory as well."""
        try:
            yield
        except BaseException as error:
            self._workers.give_up()
            if isinstance(error, Exception):
                self._workers.check()  # a block's failure is the cause
            raise

    def crossing(self, name: str, block: Block) -> HostCrossing:
        """Return a block of the host's memory as one of the memory that is served."""
        return HostCrossing(name, block, self._memory, self)

    def crossing_for_ids(self, name: str, block: Block, wanted: Collection[int]) -> HostCrossing:
        """Return the same for a block (x, ids, weights) -> delta that needs rows of some ids.

        All other rows of delta are +0.  They travel as well if the memory cannot pick rows.
        """
        memory = self._memory
        picker = memory.picker(wanted) if isinstance(memory, PicksRows) else None
        return HostCrossing(name, block, memory, self, picker)

    def call(
        self,
        name: str,
        block: Block,
        inputs: Sequence[ArrayForm],
        results: Sequence[ArrayForm],
        takes_some_rows: bool = False,
    ) -> Call:
        """Return a new call of the channel, in which `block` computes the results.

        Raises `Lfm2kitError` if the arrays are too large for a trip.
        """
        native = None
        if isinstance(block, CallsNatively) and not takes_some_rows:
            native = block.native()
        rows = inputs[0].shape[0] if inputs[0].shape else 1
        workers = min(self._most, max(1, rows // ROWS_OF_A_WORKER)) if native else 1
        try:
            call = self._channel.call(inputs, results, workers)
        except ValueError as error:
            raise Lfm2kitError(f"{name}: {error}; {SMALLER}") from error
        self._workers.add(Called(name, block, call, native, takes_some_rows), workers)
        return call

    def send(
        self,
        call: Call,
        is_tuple: bool,
        inputs: Sequence[Any],
        count: Array | None = None,
        told: Callable[[bool], None] | None = None,
    ) -> Pending:
        """Enqueue a trip, after the answer to the one before: both would lie in the same bytes.

        `told` is told of the wait for the answer.
        """
        if (before := self._newest()) is not None:
            before.receive()
        call.send(*inputs, count=count)
        trip = _Trip(call, is_tuple, count, told)
        self._newest = weakref.ref(trip)
        return trip


class _Trip:
    """A trip that has been sent."""

    def __init__(
        self,
        call: Call,
        is_tuple: bool,
        count: Array | None,
        told: Callable[[bool], None] | None,
    ) -> None:
        self._call: Call | None = call  # None: the wait for its answer has been enqueued
        self._told = told
        self._is_tuple = is_tuple  # the result
        self._count = count  # of the rows that are sent; None: all
        self._results: tuple[Any, ...] = ()

    def receive(self) -> None:
        """Enqueue the wait for the answer, unless that has been done."""
        if self._call is None:
            return
        call, self._call = self._call, None
        if self._told is not None:
            self._told(False)
        self._results = call.receive(self._count)
        if self._told is not None:
            self._told(True)

    def end(self) -> Any:
        self.receive()
        results, self._results = self._results, ()
        return results if self._is_tuple else results[0]


class _PutBack(NamedTuple):
    """A trip of rows that were picked."""

    trip: Pending
    picked: Picked

    def end(self) -> Any:
        return self.picked.put_back(self.trip.end())


class HostCrossing:
    """A block of the host's memory, called from `outer`.

    The first call with arguments of new shapes waits, and shows the shapes of the results.
    """

    def __init__(
        self,
        name: str,
        block: Block,
        outer: Outer,
        server: Server,
        picker: Picker | None = None,  # of the rows that are sent, by the second argument
    ) -> None:
        self.server = server
        self._picker = picker
        self._name = name
        self._block = block
        self._outer = outer
        self._calls: dict[Shapes, tuple[Call, bool]] = {}  # and whether the result is a tuple
        self._told: Callable[[bool], None] | None = None  # of waits

    def tell_waits(self, told: Callable[[bool], None] | None) -> None:
        self._told = told

    def __call__(self, *inputs: Any) -> Any:
        return self.begin(*inputs).end()

    def begin(self, *inputs: Any) -> Pending:
        """Enqueue the sending; the block runs beside what is enqueued before `end`."""
        shapes = tuple(tuple(array.shape) for array in inputs)
        if shapes not in self._calls:
            return Over(self._first(shapes, inputs))
        if self._picker is None:
            return self.server.send(*self._calls[shapes], inputs, told=self._told)
        picked = self._picker(inputs, inputs[1])
        trip = self.server.send(*self._calls[shapes], picked.arrays, picked.count, self._told)
        return _PutBack(trip, picked)

    def _first(self, shapes: Shapes, inputs: Sequence[Any]) -> Any:
        first = first_call(self._block, self._outer, inputs)
        takes_some_rows = self._picker is not None
        call = self.server.call(
            self._name, self._block, first.inputs, first.results, takes_some_rows
        )
        self._calls[shapes] = call, isinstance(first.result, tuple)
        CREW.rest()  # a worker's threads compute from here on
        return first.result
