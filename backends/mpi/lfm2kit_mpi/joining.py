"""Joins a process to its job: connects it to the hub, and starts MPI."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING

from lfm2kit import progress
from lfm2kit.errors import USER_ERROR, Lfm2kitError
from lfm2kit_mpi import streams
from lfm2kit_mpi.beside import start_hub
from lfm2kit_mpi.faults import place
from lfm2kit_mpi.job import HUB, STDIN
from lfm2kit_mpi.library import check_library
from lfm2kit_mpi.watch import Watch, joined, starting_seconds

if TYPE_CHECKING:
    from lfm2kit_mpi.transport import MpiTransport

# Variables in which launchers give a process its rank before MPI is started.
RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK", "PMIX_RANK")


def join(size: int) -> MpiTransport:
    """Join a job of `size` ranks and return this rank's transport."""
    progress.step("joining the job", starting_seconds())
    transport = _of_our_job(size) if HUB in os.environ else _of_another_job(size)
    progress.step("starting")
    return transport


def _of_our_job(size: int) -> MpiTransport:
    """Join a job that `--ranks` started; its hub already watches while MPI starts."""
    addresses, port, key = os.environ[HUB].split()
    watch = joined(_rank() or 0, addresses.split(","), int(port), key)
    if watch.rank == 0:
        pid, _, where = os.environ[STDIN].partition(" ")
        streams.take_stdin(pid if where == place() else None)
    streams.through_the_hub(watch)
    watch.start()
    with _told(watch):
        transport: MpiTransport = _start_mpi(size).of_this_job(watch)
    return transport


def _of_another_job(size: int) -> MpiTransport:
    """Join a job of another launcher: rank 0 starts the hub, and MPI sends its address round."""
    streams.apart()
    hub = start_hub(size) if _rank() == 0 else None
    watch = _watched(0, hub) if hub is not None else None
    with _told(watch), _limited(watch):
        mpi = _start_mpi(size)
    if hub is None and mpi.rank() == 0:  # a launcher whose variables are not known
        hub = start_hub(size)
    hub = mpi.from_rank_0(hub)
    transport: MpiTransport = mpi.of_this_job(watch or _watched(mpi.rank(), hub))
    return transport


def _start_mpi(size: int) -> ModuleType:
    """Start MPI by importing the module that needs it."""
    check_library()
    from lfm2kit_mpi import transport

    if transport.world_size() != size:
        raise Lfm2kitError(
            f"the launcher started {size} ranks, but mpi4py sees {transport.world_size()}: it uses "
            "another MPI than mpiexec does. Install mpi4py for the MPI of this machine"
        )
    return transport


@contextmanager
def _told(watch: Watch | None) -> Iterator[None]:
    """End the job on an error inside, if the rank is watched already."""
    try:
        yield
    except Lfm2kitError as error:
        if watch is not None:
            watch.abort(USER_ERROR, str(error), "")
        raise


@contextmanager
def _limited(watch: Watch | None) -> Iterator[None]:
    """Have the system end a process that nobody watches, if MPI's start takes too long inside.

    MPI's start waits for ever if another rank never joins, and holds Python's lock meanwhile.
    """
    if watch is None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(math.ceil(starting_seconds()))
    try:
        yield
    finally:
        signal.alarm(0)


def _watched(rank: int, hub: tuple[list[str], int, str]) -> Watch:
    watch = joined(rank, *hub)
    watch.start()
    return watch


def _rank() -> int | None:
    said = (os.environ.get(variable, "") for variable in RANK_VARIABLES)
    return next((int(text) for text in said if text.isdigit()), None)
