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
        self._transport = transport if aside is None else aside
        self._begin = _at_once if aside is None else aside.begin
        self._begun: list[Pending] = []
        world = World() if transport is None else transport.world
        self._shares = [share(samples, world.size, rank) for rank in range(world.size)]
        self._logits = np.empty((samples if world.rank == 0 else 0, vocab_size), np.float32)
        self._is_first = world.rank == 0
        self.sent = Sent()

    def begin(self, rows: slice, logits: Floats) -> None:
        """Begin to gather the logits of a batch, which consists of these `rows` of each share."""
        parts = [part[rows] for part in self._shares]
        with self.sent.waiting():
            self._begun.append(self._begin(partial(self._gather, parts, logits)))

    def end(self) -> Floats | None:
        """Return all samples' logits on rank 0, once they have come; None elsewhere."""
        with self.sent.waiting():
            for batch in self._begun:
                batch.end()
        return self._logits if self._is_first else None

    def _gather(self, parts: list[range], logits: Floats) -> None:
        if self._transport is None:
            self._keep(parts, logits)
            return
        everyones = self._transport.gather(logits, [len(part) for part in parts])
        if everyones is None:
            self.sent.add([len(logits)], logits.itemsize * logits.shape[1])
        else:
            self._keep(parts, everyones)

    def _keep(self, parts: list[range], logits: Floats) -> None:
        """Put the logits of these samples, one part after the other, in their places."""
        start = 0
        for part in parts:
            self._logits[part.start : part.stop] = logits[start : start + len(part)]
            start += len(part)


def gathered_bytes(samples: int, vocab_size: int) -> int:
    """Return the bytes of logits that rank 0 of several holds, at the most, to gather them.

    They are those of all samples, and once more as they come: in one batch, or in several that are
    on their way at once.
    """
    return 2 * samples * vocab_size * np.dtype(np.float32).itemsize


def _at_once(call: Callable[[], object]) -> Pending:
    return Over(call())
