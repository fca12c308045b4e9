"""How a process joins the job that it was started in: the watch over it, and MPI."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from lfm2kit import progress
from lfm2kit.errors import Lfm2kitError
from lfm2kit_mpi import streams
from lfm2kit_mpi.beside import start_hub
from lfm2kit_mpi.job import HUB
from lfm2kit_mpi.watch import Watch, joined, starting_seconds

if TYPE_CHECKING:
    from lfm2kit_mpi.transport import MpiTransport

# What launchers say of a process's rank before MPI is started.
RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK", "PMIX_RANK")


def join(size: int) -> MpiTransport:
    """This rank's transport in a job that has `size` ranks, as its launcher says."""
    progress.step("joining the job", starting_seconds())
    transport = _of_our_job(size) if HUB in os.environ else _of_another_job(size)
    progress.step("starting")
    return transport


def _of_our_job(size: int) -> MpiTransport:
    """Where `--ranks` started the job, its hub watches over MPI's start too."""
    addresses, port, key = os.environ[HUB].split()
    watch = joined(_rank() or 0, addresses.split(","), int(port), key)
    streams.through_the_hub(watch)
    watch.start()
    from lfm2kit_mpi.transport import MpiTransport, world_size  # this starts MPI

    if (wrong := _mismatch(size, world_size())) is not None:
        watch.abort(2, wrong)
    return MpiTransport(watch)


def _of_another_job(size: int) -> MpiTransport:
    """Under another launcher rank 0 starts the hub, and tells the others of it through MPI."""
    streams.apart()
    hub = start_hub(size) if _rank() == 0 else None
    watch = _watched(0, hub) if hub is not None else None
    from lfm2kit_mpi.transport import MpiTransport, from_rank_0, rank, world_size  # starts MPI

    if (wrong := _mismatch(size, world_size())) is not None:
        if watch is not None:
            watch.abort(2, wrong)
        raise Lfm2kitError(wrong)
    if hub is None and rank() == 0:  # a launcher whose variables are not known
        hub = start_hub(size)
    hub = from_rank_0(hub)
    return MpiTransport(watch or _watched(rank(), hub))


def _watched(rank: int, hub: tuple[list[str], int, str]) -> Watch:
    watch = joined(rank, *hub)
    watch.start()
    return watch


def _rank() -> int | None:
    said = (os.environ.get(variable, "") for variable in RANK_VARIABLES)
    return next((int(text) for text in said if text.isdigit()), None)


def _mismatch(launched: int, seen: int) -> str | None:
    if launched == seen:
        return None
    return (
        f"the launcher started {launched} ranks, but mpi4py sees {seen}: its MPI is another than "
        "mpiexec's. Install mpi4py for the MPI of this machine"
    )
