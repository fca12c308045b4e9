"""Removes the names of MPI's shared memory, so that none stays behind when a job is killed."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

# MPICH's, a few MB for all ranks of a machine, Open MPI's, one of each rank, and Intel MPI's.
SEGMENTS = ("/dev/shm/mpich_", "/dev/shm/sm_segment.", "/dev/shm/Intel_MPI_")


def drop_names(
    maps: Path = Path("/proc/self/maps"), beginnings: tuple[str, ...] = SEGMENTS
) -> None:
    """Remove the names of the segments that MPI has made and this process has mapped.

    Call it once every rank of this machine has mapped them.  Mapped memory stays usable, and is
    freed with the last process, however that ends.
    """
    with suppress(OSError):
        lines = (line.split(maxsplit=5) for line in maps.read_text().splitlines())
        for name in {fields[5] for fields in lines if len(fields) == 6}:
            if name.startswith(beginnings) and not name.endswith("(deleted)"):
                Path(name).unlink(missing_ok=True)


def drop_names_of(processes: Iterable[int]) -> None:
    """Do the same for other processes, before they are killed."""
    for pid in processes:
        drop_names(Path("/proc", str(pid), "maps"))
