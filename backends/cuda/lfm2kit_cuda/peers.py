"""Device memory that the ranks of a machine have mapped from each other, by CUDA IPC.

Ranks make it together, step by step, and tell each other after each step whether it has succeeded.
So a rank that cannot go on keeps no other one waiting, and all of them know why.
"""

from __future__ import annotations

from collections.abc import Callable

import cupy
import numpy as np
import numpy.typing as npt
from cupy.cuda import runtime

from lfm2kit.transport import Transport
from lfm2kit_cuda.constants import EXCHANGE
from lfm2kit_cuda.kernels import load_kernel
from lfm2kit_cuda.upload import upload

# The driver gives smaller allocations out of one piece of memory, and can map only all of it.
LEAST_BYTES = 1 << 21
TOLD_BYTES = 256  # by each rank after a step
GREETING = 1 << 20

Attempt = Callable[[], bytes]


class PeerError(Exception):
    """The reason why a rank cannot share memory with the others, which all of them know."""

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(f"rank {rank}: {reason}")
        self.rank = rank
        self.reason = reason


class Peers:
    """A block of memory of each rank, filled with zeros, at `addresses` of this process.

    To make it and to close it is collective.  Raise `PeerError` on every rank if one of them has
    too little memory, or cannot map the others'.
    """

    def __init__(self, transport: Transport, nbytes: int) -> None:
        self._transport = transport
        self._rank = transport.world.rank
        self._own = 0
        self.addresses: list[int] = []
        try:
            handles = together(transport, lambda: self._allocated(max(nbytes, LEAST_BYTES)))
            together(transport, lambda: self._mapped(handles))
        except PeerError:
            self.close()
            raise

    def _allocated(self, nbytes: int) -> bytes:
        self._own = runtime.malloc(nbytes)
        runtime.memset(self._own, 0, nbytes)
        runtime.deviceSynchronize()
        return bytes(runtime.ipcGetMemHandle(self._own))

    def _mapped(self, handles: list[bytes]) -> bytes:
        for rank, handle in enumerate(handles):
            is_own = rank == self._rank
            self.addresses.append(self._own if is_own else runtime.ipcOpenMemHandle(handle))
        return b""

    def greet(self) -> None:
        """Store into every rank's block, and look at what the others have stored into this one.

        Collective; raise `PeerError` on every rank if something is not there.
        """
        size = len(self.addresses)
        words = np.zeros(size, np.int32)

        def stored() -> bytes:
            base = upload(np.array(self.addresses, np.uint64))
            greet = load_kernel("peers", "greet_peers")
            greet((1,), EXCHANGE.THREADS, base, self._rank, size, GREETING + self._rank)
            runtime.deviceSynchronize()
            return b""

        def found() -> bytes:
            to_host = runtime.memcpyDeviceToHost
            runtime.memcpy(words.ctypes.data, self._own, words.nbytes, to_host)
            missing = [rank for rank, word in enumerate(words) if word != GREETING + rank]
            if missing:
                raise ValueError(f"nothing has come from the GPU of rank {missing[0]}")
            return b""

        together(self._transport, stored)
        together(self._transport, found)

    def close(self) -> None:
        """Unmap the others' memory, and then give back the own; every rank calls this.

        Raise `PeerError` on every rank if one of them cannot unmap the others'.  The blocks then
        stay until their processes end: no other rank may have a block mapped that is given back.
        """
        together(self._transport, self._unmapped)
        own, self._own = self._own, 0
        if own:
            runtime.free(own)

    def _unmapped(self) -> bytes:
        others, self.addresses = self.addresses, []
        runtime.deviceSynchronize()
        for rank, address in enumerate(others):
            if rank != self._rank:
                runtime.ipcCloseMemHandle(address)
        return b""


def together(transport: Transport, attempt: Attempt) -> list[bytes]:
    """Return what each rank's attempt returned, in order of rank.

    Raise `PeerError` on every rank if one of them has failed.
    """
    try:
        mine = b"+" + attempt()
    except Exception as error:
        mine = b"-" + _why(error).encode()[: TOLD_BYTES - 1]
    everyones = _told(transport, mine)
    for rank, told in enumerate(everyones):
        if not told.startswith(b"+"):
            raise PeerError(rank, told[1:].rstrip(b"\0").decode(errors="replace"))
    return [told[1 : len(mine)] for told in everyones]


def _told(transport: Transport, mine: bytes) -> list[bytes]:
    """Return the bytes of every rank, in order of rank, with zeros behind them."""
    size = transport.world.size
    row: npt.NDArray[np.uint8] = np.zeros(TOLD_BYTES, np.uint8)
    row[: len(mine)] = np.frombuffer(mine, np.uint8)
    rows, _ = transport.all_to_all(np.tile(row, (size, 1)), [1] * size, [1] * size)
    return [one.tobytes() for one in rows]


def _why(error: Exception) -> str:
    """Return why an attempt failed, in a line."""
    if isinstance(error, runtime.CUDARuntimeError | cupy.cuda.driver.CUDADriverError):
        return f"CUDA says {error}"
    return str(error).partition("\n")[0] or type(error).__name__
