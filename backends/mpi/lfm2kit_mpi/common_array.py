"""Arrays that the ranks of one machine have in common.  Importing this module starts MPI."""

from __future__ import annotations

import math
import mmap
import os
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from mpi4py import MPI


class Place(NamedTuple):
    """Memory of another process, and how it is recognised."""

    path: str
    device: int
    number: int  # of the inode

    @classmethod
    def of(cls, descriptor: int) -> Place:
        told = os.fstat(descriptor)
        return cls(f"/proc/{os.getpid()}/fd/{descriptor}", told.st_dev, told.st_ino)


def common_array(
    comm: MPI.Intracomm, shape: tuple[int, ...], dtype: npt.DTypeLike
) -> npt.NDArray[Any] | None:
    """Return a new array that all ranks of a machine have mapped; None if one of them cannot.

    It has no name, so it is freed with the last process that has mapped it.
    """
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    made = _made(nbytes) if comm.Get_rank() == 0 else None
    place = comm.bcast(None if made is None else Place.of(made))
    mapped = None if place is None else _mapped(place, nbytes)
    everyone_has = comm.allreduce(mapped is not None, MPI.LAND)
    if made is not None:
        os.close(made)
    if mapped is None or not everyone_has:
        return None
    return np.frombuffer(mapped, dtype).reshape(shape)


def _made(nbytes: int) -> int | None:
    """Return a descriptor of new memory that the system has given in full, or None."""
    if not hasattr(os, "memfd_create"):
        return None
    descriptor = os.memfd_create("lfm2kit", os.MFD_CLOEXEC)
    try:
        os.posix_fallocate(descriptor, 0, nbytes)  # else a write could end the process
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _mapped(place: Place, nbytes: int) -> mmap.mmap | None:
    """Map another process's memory; None if it cannot be seen from this one's container."""
    try:
        descriptor = os.open(place.path, os.O_RDWR)
    except OSError:
        return None
    try:
        told = os.fstat(descriptor)
        is_it = (told.st_dev, told.st_ino) == (place.device, place.number)
        return mmap.mmap(descriptor, nbytes) if is_it else None
    finally:
        os.close(descriptor)
