"""Collectives over host arrays with mpi4py.  Importing this module starts MPI."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from lfm2kit.transport import World
from lfm2kit_mpi.shared_memory import drop_names
from lfm2kit_mpi.watch import Watch

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

    @cached_property
    def comm(self) -> MPI.Intracomm:
        return self._make()

    def group(self, ranks: Sequence[int]) -> MpiTransport:
        def make() -> MPI.Intracomm:
            return self.comm.Create_group(self.comm.Get_group().Incl(list(ranks)))

        return MpiTransport(self.watch, self.world.within(ranks), make)

    def all_to_all(
        self, rows: npt.NDArray[Any], send_counts: Sequence[int]
    ) -> tuple[npt.NDArray[Any], list[int]]:
        with self.watch.waiting_in("all_to_all"):
            return self._exchanged(rows, send_counts)

    def _exchanged(
        self, rows: npt.NDArray[Any], send_counts: Sequence[int]
    ) -> tuple[npt.NDArray[Any], list[int]]:
        counts = [int(count) for count in self.comm.alltoall(list(send_counts))]
        received = np.empty((sum(counts), *rows.shape[1:]), rows.dtype)
        row = _row_type(rows)
        try:
            self.comm.Alltoallv(
                [rows, (list(send_counts), _starts(send_counts)), row],
                [received, (counts, _starts(counts)), row],
            )
        finally:
            row.Free()
        return received, counts

    def gather(self, rows: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
        with self.watch.waiting_in("gather"):
            return self._gathered(rows)

    def _gathered(self, rows: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
        counts = self.comm.gather(len(rows))
        row = _row_type(rows)
        try:
            if counts is None:
                self.comm.Gatherv([np.ascontiguousarray(rows), len(rows), row], None)
                return None
            everyone = np.empty((sum(counts), *rows.shape[1:]), rows.dtype)
            self.comm.Gatherv(
                [np.ascontiguousarray(rows), len(rows), row],
                [everyone, (counts, _starts(counts)), row],
            )
            return everyone
        finally:
            row.Free()

    def barrier(self) -> None:
        with self.watch.waiting_in("barrier"):
            self.comm.Barrier()

    def finish(self, exit_code: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.watch.done(exit_code)

    def abort(self, exit_code: int, reason: str, details: str = "") -> NoReturn:
        self.watch.abort(exit_code, reason, details)


def _row_type(rows: npt.NDArray[Any]) -> MPI.Datatype:
    """Return a type for a whole row: counts of bytes would pass 2^31 at a few hundred MB."""
    nbytes = rows.dtype.itemsize * int(np.prod(rows.shape[1:], dtype=np.int64))
    return MPI.BYTE.Create_contiguous(nbytes).Commit()


def _starts(counts: Sequence[int]) -> list[int]:
    return [sum(counts[:i]) for i in range(len(counts))]
