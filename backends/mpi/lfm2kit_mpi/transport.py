"""Collectives over host arrays with mpi4py.  Importing this module starts MPI."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from contextlib import AbstractContextManager, contextmanager
from itertools import accumulate
from threading import Lock
from typing import Any, NamedTuple, NoReturn
from zlib import crc32

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from lfm2kit.aside import Begun, InOrder
from lfm2kit.pending import Pending
from lfm2kit.transport import World
from lfm2kit_mpi.common_array import common_array
from lfm2kit_mpi.shared_memory import drop_names
from lfm2kit_mpi.watch import Watch

# How an exchange beside a computation is looked at.
LOOKS = 32  # one after the other: MPI takes a few kB at each from a link of TCP
PAUSE = 1 / 16  # before the next looks, of the time that the exchange has taken
LONGEST_PAUSE = 4e-4  # seconds
TAGS = 32767  # that every MPI has
Buffer = list[Any]  # rows, with how many each rank sends or gets, and their type

if not MPI.Is_initialized():  # it may have been loaded without being started
    MPI.Init_thread()


def world_size() -> int:
    return MPI.COMM_WORLD.Get_size()


def rank() -> int:
    return MPI.COMM_WORLD.Get_rank()


def from_rank_0(value: Any) -> Any:
    """Return rank 0's `value` on every rank."""
    return MPI.COMM_WORLD.bcast(value)


def of_this_job(watch: Watch) -> MpiTransport:
    """Return the transport among all ranks of this job."""
    job = MPI.COMM_WORLD
    # Not rank // n: launchers may number the ranks of one machine in any way.
    local = job.Split_type(MPI.COMM_TYPE_SHARED)
    nodes = job.allgather(local.bcast(job.Get_rank()))
    local.Barrier()
    if local.Get_rank() == 0:
        drop_names()
    return MpiTransport(watch, World.of(job.Get_rank(), nodes), lambda: job)


class MpiTransport:
    """Ranks of MPI's COMM_WORLD, each of them watched."""

    def __init__(self, watch: Watch, world: World, make: Callable[[], MPI.Intracomm]) -> None:
        self.watch = watch
        self.world = world
        self._make = make  # the communicator, for which all of its ranks have to come
        self._comm: MPI.Intracomm | None = None
        self._making = Lock()  # calls aside may need it first
        self._asides: dict[str, MpiAside] = {}

    @property
    def comm(self) -> MPI.Intracomm:
        with self._making:
            self._comm = self._comm or self._make()
            return self._comm

    def group(self, ranks: Sequence[int]) -> MpiTransport:
        return MpiTransport(self.watch, self.world.within(ranks), lambda: self._among(ranks))

    def aside(self, purpose: str) -> MpiAside | None:
        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            return None
        if purpose not in self._asides:
            self._asides[purpose] = MpiAside(self, purpose)
        return self._asides[purpose]

    def _among(self, ranks: Sequence[int], tag: int = 0) -> MPI.Intracomm:
        """Return a new communicator; several may be made at once, with tags that differ."""
        return self.comm.Create_group(self.comm.Get_group().Incl(list(ranks)), tag)

    def all_to_all(
        self,
        rows: npt.NDArray[Any],
        send_counts: Sequence[int],
        receive_counts: Sequence[int] | None = None,
        into: npt.NDArray[Any] | None = None,
    ) -> tuple[npt.NDArray[Any], list[int]]:
        if receive_counts is None:
            each = [1] * self.world.size
            counts, _ = self.all_to_all(np.array(send_counts, np.int32), each, each)
            receive_counts = counts.tolist()
        with self._inside("all_to_all"):
            received = _empty_like(rows, receive_counts) if into is None else into
            with _row_type(rows) as row:
                self._swap_rows(
                    [rows, (list(send_counts), _starts(send_counts)), row],
                    [received, (list(receive_counts), _starts(receive_counts)), row],
                )
        return received, list(receive_counts)

    def _inside(self, collective: str) -> AbstractContextManager[None]:
        return self.watch.waiting_in(collective)

    def _swap_rows(self, sent: Buffer, received: Buffer) -> None:
        self.comm.Alltoallv(sent, received)

    def gather(
        self, rows: npt.NDArray[Any], counts: Sequence[int] | None = None
    ) -> npt.NDArray[Any] | None:
        rows = np.ascontiguousarray(rows)
        with self._inside("gather"):
            if counts is None:
                counts = self._on_rank_0(len(rows))
            with _row_type(rows) as row:
                mine: Buffer = [rows, len(rows), row]
                if self.world.rank > 0:
                    self._gather_rows(mine, None)
                    return None
                everyone = _empty_like(rows, counts)
                self._gather_rows(mine, [everyone, (list(counts), _starts(counts)), row])
                return everyone

    def _gather_rows(self, sent: Buffer, received: Buffer | None) -> None:
        self.comm.Gatherv(sent, received)

    def _on_rank_0(self, count: int) -> list[int]:
        """Return each rank's number, in order of rank, on rank 0; zeros elsewhere."""
        received = np.zeros(self.world.size, np.int32)
        self.comm.Gather(np.array([count], np.int32), received)
        return [int(count) for count in received]

    def shared(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any] | None:
        if len(set(self.world.nodes)) > 1:
            return None
        with self._inside("shared"):
            return common_array(self.comm, shape, dtype)

    def barrier(self) -> None:
        with self.watch.waiting_in("barrier"):
            self.comm.Barrier()

    def finish(self, exit_code: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.watch.done(exit_code)

    def abort(self, exit_code: int, reason: str, details: str = "") -> NoReturn:
        self.watch.abort(exit_code, reason, details)


class MpiAside(MpiTransport):
    """The same ranks, for calls beside the thread that computes."""

    def __init__(self, transport: MpiTransport, purpose: str) -> None:
        ranks, tag = range(transport.world.size), 1 + crc32(purpose.encode()) % TAGS
        super().__init__(transport.watch, transport.world, lambda: transport._among(ranks, tag))
        self._purpose = purpose
        self._calls = InOrder()

    def begin(self, call: Callable[[], Any]) -> Pending:
        return Watched(self.watch, self._purpose, self._calls.begin(call))

    def _inside(self, collective: str) -> AbstractContextManager[None]:
        return self.watch.beside()

    def _swap_rows(self, sent: Buffer, received: Buffer) -> None:
        _wait_idly(self.comm.Ialltoallv(sent, received))

    def _gather_rows(self, sent: Buffer, received: Buffer | None) -> None:
        _wait_idly(self.comm.Igatherv(sent, received))


class Watched(NamedTuple):
    """A call beside the thread that computes, for which that thread is seen to wait."""

    watch: Watch
    purpose: str
    call: Begun

    def end(self) -> Any:
        if not self.call.future.done():
            with self.watch.waiting_in(f"the {self.purpose}"):
                wait([self.call.future])
        return self.call.end()


def _wait_idly(request: MPI.Request) -> None:
    """Wait without spinning, as MPI's own waiting does, on the core that computes."""
    start = time.monotonic()
    while not any(request.Test() for _ in range(LOOKS)):
        time.sleep(min(LONGEST_PAUSE, PAUSE * (time.monotonic() - start)))


@contextmanager
def _row_type(rows: npt.NDArray[Any]) -> Iterator[MPI.Datatype]:
    """Yield a type for a whole row: counts of bytes would pass 2^31 at a few hundred MB."""
    nbytes = rows.dtype.itemsize * int(np.prod(rows.shape[1:], dtype=np.int64))
    row = MPI.BYTE.Create_contiguous(nbytes).Commit()
    try:
        yield row
    finally:
        row.Free()


def _empty_like(rows: npt.NDArray[Any], counts: Sequence[int]) -> npt.NDArray[Any]:
    """Return memory for all ranks' rows."""
    return np.empty((sum(counts), *rows.shape[1:]), rows.dtype)


def _starts(counts: Sequence[int]) -> list[int]:
    return [0, *accumulate(counts)][:-1]
