"""Blocks of one memory that are called in the midst of another memory's work, captured or not.

Without this, the core copies a block's arguments to the host, waits, calls the block and copies its
results back, and a forward with such a copy is never captured.  A *crossing* needs no waiting: the
outer memory's work hands the arguments to a thread of the host by itself, and waits for its answer.
One such call is a *trip*.

Two sides take part.  The outer memory has the capability `Signals`: it gives a `Channel`, which its
work writes to and waits at.  A backend has the capability `Crosses` (see `lfm2kit.backend`): it has
the threads that call blocks, and makes a `Crossing` of each block.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from lfm2kit.memory import Array, Ordered


class Server(Protocol):
    """The threads that call the blocks of one backend's crossings."""

    def serving(self) -> AbstractContextManager[None]:
        """Return a context in which one forward runs, from its first block to its logits.

        The threads work inside this context only.  Once it is left they sleep, at the latest after
        a fraction of a millisecond, in which the next forward may find them awake.  If a block has
        failed, or a deadline has passed, leaving the context raises it, with the name of the block,
        and the next forward works again.
        """
        ...


class Crossing(Protocol):
    """A block of another memory, called with arrays of the outer memory.

    A call enqueues the trip in the outer memory's current stream and returns without waiting, so
    that it can be captured.  The first call with arguments of new shapes may wait.

    A crossing may tell when it waits (`lfm2kit.backend.TellsWaits`).

    A crossing may also have `begin` (see `lfm2kit.pending`), which enqueues the sending; `end` then
    enqueues the wait for the answer.  What is enqueued between the two runs beside the block.  If
    another crossing of the same channel is called between them, the wait is enqueued before its
    trip is sent.
    """

    @property
    def server(self) -> Server:
        """Whoever calls the block: the same object for all crossings of a backend."""
        ...

    def __call__(self, *inputs: Any) -> Any: ...


class ArrayForm(NamedTuple):
    """The shape and the dtype of an array."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class Call(Protocol):
    """Trips with arrays of the same shapes, as `Channel.call` returns it."""

    @property
    def number(self) -> int:
        """Return the call's number in its channel: 0, 1, 2, ..."""
        ...

    @property
    def inputs(self) -> Sequence[npt.NDArray[Any]]:
        """Return the host arrays in which the arguments lie until the trip is answered."""
        ...

    @property
    def results(self) -> Sequence[npt.NDArray[Any]]:
        """Return the host arrays that are to be filled before the answer."""
        ...

    def send(self, *arrays: Array, count: Array | None = None) -> None:
        """Enqueue in the current stream: copy the arguments to `inputs`, then announce the trip.

        With a `count`, int32 [1], only the first `count` rows of each array are copied.  All arrays
        and results of such a call have the same number of rows, and `count` does not exceed it.
        """
        ...

    def receive(self, count: Array | None = None) -> tuple[Array, ...]:
        """Enqueue in the current stream: wait for the answers, then copy `results`.

        The arrays returned are new ones.  Nothing else is sent through the channel before.  With
        the `count` of `send`, only the first rows are copied; the others may hold anything.
        """
        ...


class Channel(Protocol):
    """Host memory through which enqueued work calls threads of the host, one trip at a time.

    All calls share the same bytes for their arguments and results.  Numbers of trips are counted in
    the memory, so that captured work, replayed, makes new ones.  They begin again at 0 after
    2^32 - 1: compare them for equality.
    """

    @property
    def sent(self) -> npt.NDArray[np.uint32]:
        """Return [3]: the numbers of the newest trip and of the call that it makes, and its rows.

        The rows are the `count` of `send`; without one they are those of the first argument, or 1
        if it has none.  The memory writes the arguments, then the rows and the call's number, and
        last the trip's: who reads the trip's with acquire semantics then finds the others.
        """
        ...

    @property
    def answered(self) -> npt.NDArray[np.uint32]:
        """Return [workers, 16]: in column 0 the newest trip that each worker has answered.

        A worker writes its share of the results, and last this number, with release semantics.
        """
        ...

    @property
    def failed(self) -> npt.NDArray[np.uint32]:
        """Return [2]: whether the host has failed; 1 + the number of the call that was too late.

        While either is not 0, nothing waits, and the bytes of all results are 0xFF: expert id -1,
        NaN.  The host sets the first one before it answers, and both to 0 once the memory is idle.
        """
        ...

    @property
    def deadline(self) -> npt.NDArray[np.float32]:
        """Return [1]: the seconds after which a wait ends without an answer.

        The host may write it at any time.  Waits read it while they wait, those of captured work as
        well.
        """
        ...

    def call(self, inputs: Sequence[ArrayForm], results: Sequence[ArrayForm], workers: int) -> Call:
        """Return a new call, which waits for the answers of the first `workers` workers.

        Raise ValueError if the arrays are more, or larger, than a trip carries.
        """
        ...

    def close(self) -> None:
        """Give the memory back.  Nothing that was captured with it may run afterwards."""
        ...


@runtime_checkable
class Signals(Protocol):
    """Capability of an ordered memory whose work can call threads of the host."""

    @property
    def name(self) -> str: ...

    def channel(self, workers: int, deadline: float) -> Channel:
        """Return a channel to `workers` threads, whose `deadline` is at first this number."""
        ...


class Picked(Protocol):
    """Some rows of arrays, one behind the other."""

    @property
    def arrays(self) -> tuple[Array, ...]:
        """Return arrays of the given ones' shapes: rows picked, in their order, then anything."""
        ...

    @property
    def count(self) -> Array:
        """Return the number of rows picked, int32 [1]."""
        ...

    def put_back(self, array: Array) -> Array:
        """Return an array of such rows with each where it was, and +0 in all others.

        `array` is float32 [rows, columns], and may hold anything from row `count` on.
        """
        ...


class Picker(Protocol):
    """Picks rows by the ids in them."""

    def __call__(self, arrays: Sequence[Array], ids: Array) -> Picked:
        """Enqueue in the current stream: pick the rows of all arrays that have a wanted id.

        `ids` is int32 [rows, k].  The arrays have as many rows, and elements of 4 bytes.
        """
        ...


@runtime_checkable
class PicksRows(Protocol):
    """Capability of a memory: it finds out which rows a block needs, so that no others travel.

    How many rows that are is known to enqueued work only; `Call.send` takes it from there.
    """

    @property
    def name(self) -> str: ...

    def picker(self, wanted: Collection[int]) -> Picker:
        """Return what picks the rows that have one of these ids, which are not negative."""
        ...


@runtime_checkable
class Near(Protocol):
    """Capability of a memory that some cores of the machine reach faster than others."""

    @property
    def name(self) -> str: ...

    def near_cores(self) -> Collection[int]:
        """Return the numbers of the cores that reach it fastest; none if that is not known.

        Threads that answer a channel run there, if the process may use these cores.
        """
        ...


class NativeCall(NamedTuple):
    """A block as machine code: it can be called without Python, by several threads at once.

    `function` is the address of

        void f(const void *argument, const void *const *inputs, void *const *results,
               int64_t rows, int64_t part, int64_t parts)

    which computes the rows from `rows * part / parts` to `rows * (part + 1) / parts` of the
    results, rounded down.  `rows` is the length of the first input.  It needs neither Python's lock
    nor the stack of a Python thread, and raises nothing.
    """

    function: int
    argument: int  # an address, passed as it is
    owner: object  # keeps both alive


@runtime_checkable
class CallsNatively(Protocol):
    """Capability of a block of the host's memory: it can be called as machine code."""

    def native(self) -> NativeCall:
        """Return the block as machine code; its results have the bits of a plain call."""
        ...


@runtime_checkable
class Fills(Protocol):
    """Capability of a block of the host's memory: it can write its results where they are wanted.

    Whoever calls a block from another memory asks for it: results need not be copied then.
    """

    def fill(self, results: Sequence[npt.NDArray[Any]], *inputs: Any) -> None:
        """Compute the results of a call with these inputs, with the same bits, in given arrays.

        `results` are C-contiguous, of the shapes and dtypes that a call returns, and have any
        values.  They share no memory with `inputs`.
        """
        ...


class FirstCall(NamedTuple):
    """What the first call of a block with arguments of some shapes shows."""

    result: Any  # in the memory of the arguments: an array, or a tuple of them
    inputs: Sequence[ArrayForm]
    results: Sequence[ArrayForm]


def first_call(block: Callable[..., Any], outer: Ordered, inputs: Sequence[Array]) -> FirstCall:
    """Call a block of the host's memory with arrays of `outer`; wait for them, and show the forms.

    A crossing does this outside of captured work, to know what a `Call` takes and returns.
    """
    arriving = [outer.start_to_host(array) for array in inputs]
    arrays = [copy.wait() for copy in arriving]
    made = block(*arrays)
    results = made if isinstance(made, tuple) else (made,)
    moved = tuple(outer.from_host(np.ascontiguousarray(array)) for array in results)
    return FirstCall(
        moved if isinstance(made, tuple) else moved[0], _forms(arrays), _forms(results)
    )


def _forms(arrays: Sequence[npt.NDArray[Any]]) -> list[ArrayForm]:
    return [ArrayForm(array.shape, np.dtype(array.dtype)) for array in arrays]
