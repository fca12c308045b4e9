"""Checks which MPI mpi4py has before it starts, because a wrong one would end the process."""

from __future__ import annotations

import os
from collections.abc import Mapping

from lfm2kit.errors import Lfm2kitError

OPEN_MPI = ("Open MPI", "Spectrum MPI")  # whose ranks Open MPI's mpirun starts
OPEN_MPI_SIZE = "OMPI_COMM_WORLD_SIZE"


def check_library() -> None:
    """Load MPI without starting it; raise `Lfm2kitError` if it cannot join this job."""
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        mpi4py.rc.finalize = True
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # mpi4py's, where it finds no MPI
        said = str(error).replace("\n", ": ")
        raise Lfm2kitError(
            f"this is one rank of several, but there is no MPI here: {said}; install mpi4py, and "
            "an MPI that it can load"
        ) from error
    vendor, version = MPI.get_vendor()
    if not fits(vendor, os.environ):
        name = f"{vendor} {'.'.join(map(str, version))}"
        raise Lfm2kitError(
            f"Open MPI's mpirun started this rank, but mpi4py has {name}: start the job with that "
            "one's mpiexec, or install mpi4py for Open MPI"
        )


def fits(vendor: str, environment: Mapping[str, str]) -> bool:
    """Return whether the MPI of `vendor` can join a job of this environment's launcher."""
    return OPEN_MPI_SIZE not in environment or vendor in OPEN_MPI
