"""Brings the logits of all ranks to rank 0: through memory in common, or by messages.

Messages of a batch are sent while the next one is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lfm2kit.pending import Over, Pending
from lfm2kit.transport import Sent, SharesMemory, Transport, WorksAside, World, share

Floats = npt.NDArray[np.float32]


class Gather(Protocol):
    """The gather of the logits of some samples, which ranks share out in order."""

    sent: Sent  # by this rank

    def begin(self, rows: slice, logits: Floats) -> None:
        """Begin to gather the logits of a batch, which consists of these `rows` of each share."""
        ...

    def end(self, rows: slice, logits: Floats) -> Floats | None:
        """Gather the last batch, and return all samples' logits on rank 0; None elsewhere."""
        ...


def gather_over(transport: Transport | None, samples: int, vocab_size: int) -> Gather:
    """Return the gather of the logits of `samples` samples; every rank calls this."""
    shape = samples, vocab_size
    if isinstance(transport, SharesMemory) and transport.world.size > 1:
        common = transport.shared(shape, np.float32)
        if common is not None:
            return GatherInCommon(transport, common)
    return GatherOfMessages(transport, samples, vocab_size)


class GatherInCommon:
    """A gather in memory that all ranks have in common: each writes its logits in their places."""

    def __init__(self, transport: Transport, logits: Floats) -> None:
        self._transport, self._logits = transport, logits
        self._mine = share(len(logits), transport.world.size, transport.world.rank)
        self._write(slice(None), np.float32(0))  # so that its pages are there when time counts
        self.sent = Sent()

    def begin(self, rows: slice, logits: Floats) -> None:
        with self.sent.waiting():
            self._write(rows, logits)
            if self._transport.world.rank > 0:
                self.sent.add([len(logits)], logits.itemsize * logits.shape[1])

    def end(self, rows: slice, logits: Floats) -> Floats | None:
        self.begin(rows, logits)
        with self.sent.waiting():
            self._transport.barrier()
        return self._logits if self._transport.world.rank == 0 else None

    def _write(self, rows: slice, logits: Floats | np.float32) -> None:
        part = self._mine[rows]
        self._logits[part.start : part.stop] = logits


class GatherOfMessages:
    """A gather by the transport's collective, where ranks have no memory in common.

    Where a transport does not work aside, each batch waits until its logits have come.
    """

    def __init__(self, transport: Transport | None, samples: int, vocab_size: int) -> None:
        aside = transport.aside("gather") if isinstance(transport, WorksAside) else None
        self._transport = transport
        self._beside = transport if aside is None else aside
        self._begin = _at_once if aside is None else aside.begin
        self._begun: list[Pending] = []
        world = World() if transport is None else transport.world
        self._shares = [share(samples, world.size, rank) for rank in range(world.size)]
        self._shape = samples if world.rank == 0 else 0, vocab_size
        self._logits: Floats | None = None  # of several batches
        self.sent = Sent()

    def begin(self, rows: slice, logits: Floats) -> None:
        if self._logits is None:
            self._logits = np.empty(self._shape, np.float32)
        with self.sent.waiting():
            self._begun.append(self._begin(partial(self._gather, self._beside, rows, logits)))

    def end(self, rows: slice, logits: Floats) -> Floats | None:
        """Do it by the transport's blocking collective, because nothing is computed meanwhile."""
        with self.sent.waiting():
            for batch in self._begun:
                batch.end()
            last = self._gathered(self._transport, rows, logits)
            if last is None or self._logits is None:
                return last  # of a single batch, which are those of all samples in order
            self._keep(rows, last)
        return self._logits

    def _gather(self, transport: Transport | None, rows: slice, logits: Floats) -> None:
        everyones = self._gathered(transport, rows, logits)
        if everyones is not None:
            self._keep(rows, everyones)

    def _gathered(self, transport: Transport | None, rows: slice, logits: Floats) -> Floats | None:
        """Return the logits of a batch of all ranks on rank 0, and None elsewhere."""
        if transport is None:
            return logits
        everyones = transport.gather(logits, [len(part[rows]) for part in self._shares])
        if everyones is None:
            self.sent.add([len(logits)], logits.itemsize * logits.shape[1])
        return everyones

    def _keep(self, rows: slice, logits: Floats) -> None:
        """Put the logits of a batch, one rank's after the other, in their places."""
        assert self._logits is not None, "there are several batches"
        start = 0
        for part in (one[rows] for one in self._shares):
            self._logits[part.start : part.stop] = logits[start : start + len(part)]
            start += len(part)


def gathered_bytes(samples: int, vocab_size: int) -> int:
    """Return the bytes of logits that rank 0 of several holds, at the most, to gather them.

    They are those of all samples, and once more as they come, in several batches that are on their
    way at once.
    """
    return 2 * samples * vocab_size * np.dtype(np.float32).itemsize


def _at_once(call: Callable[[], object]) -> Pending:
    return Over(call())
