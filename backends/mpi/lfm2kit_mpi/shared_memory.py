"""Shared memory that MPI has made, and that must not stay behind when a job is killed."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

SEGMENTS = "/dev/shm/mpich_"  # MPICH's, a few MB for all ranks of a machine


def drop_names(maps: Path = Path("/proc/self/maps"), beginning: str = SEGMENTS) -> None:
    """Removes the names of the segments of MPICH that this process has mapped.

    To be called once every rank of this machine has mapped them: what is mapped stays, and goes
    with the last process, however that ends.
    """
    with suppress(OSError):
        lines = (line.split(maxsplit=5) for line in maps.read_text().splitlines())
        for name in {fields[5] for fields in lines if len(fields) == 6}:
            if name.startswith(beginning) and not name.endswith("(deleted)"):
                Path(name).unlink(missing_ok=True)
