"""The mailboxes of all ranks, as this rank has mapped them, and its own numbers (exchange.cu)."""

from __future__ import annotations

from typing import Any, NamedTuple

import cupy
import cupyx
import numpy as np
import numpy.typing as npt

from lfm2kit.transport import Transport
from lfm2kit_cuda.exchange_size import Size
from lfm2kit_cuda.peers import Peers
from lfm2kit_cuda.pinned import Mapped
from lfm2kit_cuda.upload import upload

STATE_WORDS = 3  # the newest call, CTAs that have arrived, a cause
GAVE_UP, CAUSE, DEADLINE, CONTROL_WORDS = 0, 1, 2, 3  # words that the host has mapped


class Cause(NamedTuple):
    """The reason why an exchange has failed: which rank, in which layer's exchange."""

    kind: int
    rank: int
    layer: int


class Mailboxes:
    """The mailboxes of all ranks; to make and to close them is collective, as with `Peers`."""

    def __init__(self, transport: Transport, size: Size) -> None:
        self.size = size
        self._peers = Peers(transport, size.nbytes(transport.world.size))
        self.base = upload(np.array(self._peers.addresses, np.uint64))
        self.state = upload(np.zeros(STATE_WORDS, np.uint32))
        cupy.cuda.get_current_stream().synchronize()  # whatever stream the first call is in
        self._words: npt.NDArray[np.uint32] = cupyx.empty_pinned(CONTROL_WORDS, np.uint32)
        self._words[...] = 0  # pinned memory is used again
        self.control: Any = Mapped.of(self._words)

    @property
    def deadline(self) -> float:
        """Return the seconds after which a wait for another rank ends."""
        return float(self._words[DEADLINE:].view(np.float32)[0])

    def begin(self, deadline: float) -> None:
        """Begin a forward: set the deadline, which kernels read while they wait, captured ones too.

        If the host gave up in a forward before, and no kernel has seen that, nothing is lost.
        """
        self._words[GAVE_UP] = 0
        self._words[DEADLINE:].view(np.float32)[0] = deadline

    def give_up(self) -> None:
        """End all waits of this rank's kernels, which tell the other ranks."""
        self._words[GAVE_UP] = 1

    def cause(self) -> Cause | None:
        """Return why the exchange has failed, once this rank's work is done; None if it has not."""
        word = int(self._words[CAUSE])
        if not word:
            return None
        rank, kind = divmod((word & 0xFF) - 1, 2)
        return Cause(kind, rank, word >> 8)

    def close(self) -> None:
        self._peers.close()
