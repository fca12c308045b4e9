"""Brings the logits of all ranks to rank 0: those of a batch while the next one is computed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt

from lfm2kit.pending import Over, Pending
from lfm2kit.transport import Sent, Transport, WorksAside, World, share

Floats = npt.NDArray[np.float32]


class Gather:
    """The gather of the logits of `samples` samples, which ranks share out in order.

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
        """Begin to gather the logits of a batch, which consists of these `rows` of each share."""
        if self._logits is None:
            self._logits = np.empty(self._shape, np.float32)
        with self.sent.waiting():
            self._begun.append(self._begin(partial(self._gather, self._beside, rows, logits)))

    def end(self, rows: slice, logits: Floats) -> Floats | None:
        """Gather the last batch, and return all samples' logits on rank 0; None elsewhere.

        Nothing is computed meanwhile, so the transport may wait as it is fastest.
        """
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
