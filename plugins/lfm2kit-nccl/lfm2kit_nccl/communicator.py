"""NCCL's communicator among the ranks of a transport, by CuPy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cupy
import numpy as np
from cupy.cuda import nccl  # CuPy makes it an attribute of cupy.cuda only if it is imported

from lfm2kit.errors import Lfm2kitError
from lfm2kit.memory import Array, Memory
from lfm2kit.ranks.agreement import Refusal, agree
from lfm2kit.transport import Transport
from lfm2kit_nccl.exchange import Communicator

# NVLink multicast is not there on every machine, and buffers that are registered for a graph would
# have to be captured by all ranks together.
SETTINGS = {"NCCL_NVLS_ENABLE": "0", "NCCL_GRAPH_REGISTER": "0"}
ID_BYTES = 128


class Nccl:
    """All operations are enqueued in the current stream, and can be captured."""

    arrays = cupy

    def __init__(self, size: int, unique_id: bytes, rank: int) -> None:
        self._size = size
        self._nccl: Any = nccl.NcclCommunicator(size, unique_id, rank)

    def all_gather(self, array: Array) -> Array:
        array = cupy.ascontiguousarray(array)
        everyones = cupy.empty((self._size, *array.shape), array.dtype)
        with _errors_in_words():
            self._nccl.allGather(
                array.data.ptr, everyones.data.ptr, array.nbytes, nccl.NCCL_UINT8,
                cupy.cuda.get_current_stream().ptr,
            )  # fmt: skip
        return everyones

    def swap(self, blocks: Array) -> Array:
        blocks = cupy.ascontiguousarray(blocks)
        came, stream = cupy.empty_like(blocks), cupy.cuda.get_current_stream().ptr
        nbytes, unit = blocks[0].nbytes, nccl.NCCL_UINT8
        with _errors_in_words(), _grouped():
            for peer in range(self._size):
                self._nccl.send(blocks[peer].data.ptr, nbytes, unit, peer, stream)
                self._nccl.recv(came[peer].data.ptr, nbytes, unit, peer, stream)
        return came


@contextmanager
def _grouped() -> Iterator[None]:
    """Make one operation of what is begun inside; a group is ended even if part of it fails."""
    nccl.groupStart()
    try:
        yield
    finally:
        nccl.groupEnd()


@contextmanager
def _errors_in_words() -> Iterator[None]:
    try:
        yield
    except nccl.NcclError as error:
        raise Lfm2kitError(f"NCCL says {error}") from None


def connected(transport: Transport, memory: Memory) -> tuple[Communicator | None, str | None]:
    """Return a communicator among the ranks, or why this one has none; every rank calls this."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    unique_id, reason = _made_id(is_first=transport.world.rank == 0)
    if agree(transport, {} if reason is None else Refusal(reason)) is not None:
        return None, reason
    unique_id = _of_first(transport, unique_id)
    try:
        with cupy.cuda.Device(int(memory.name.rpartition(":")[2])):
            return Nccl(transport.world.size, unique_id, transport.world.rank), None
    except nccl.NcclError as error:
        return None, f"NCCL says {error}"


def _made_id(*, is_first: bool) -> tuple[bytes, str | None]:
    """Return the id that rank 0 makes, zeros on the others; or why there can be none."""
    none = bytes(ID_BYTES)
    if not nccl.available:
        return none, "CuPy finds no NCCL; install nvidia-nccl-cu13"
    try:
        return nccl.get_unique_id() if is_first else none, None
    except nccl.NcclError as error:
        return none, f"NCCL says {error}"


def _of_first(transport: Transport, unique_id: bytes) -> bytes:
    """Return the id of rank 0 on every rank."""
    size = transport.world.size
    mine = np.tile(np.frombuffer(unique_id, np.uint8), (size, 1))
    everyones, _ = transport.all_to_all(mine, [1] * size, [1] * size)
    return bytes(everyones[0])
