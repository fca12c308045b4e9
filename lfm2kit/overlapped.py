"""Whether experts are computed while tokens travel: asked for, impossible, or found to pay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from lfm2kit.errors import Lfm2kitError, Option
from lfm2kit.transport import Exchanging, Transport, WorksInPieces, everyones

ON, OFF, AUTO = "on", "off", "auto"
OVERLAP = (ON, OFF, AUTO)
LEAST_SHARE = 0.15  # of the time of experts and exchange that the latter takes where overlap pays
# Seconds of a layer's exchange: a shorter one may take longer in pieces, beside the computation.
LEAST_SECONDS = 2e-3


class Overlap:
    """Whether a model's forwards overlap exchange and computation, and why not.

    With a `transport` the first forward decides, after `layers` calls of `note`.
    """

    def __init__(
        self,
        asked: str,
        is_on: bool = False,
        why: str | None = None,
        transport: Transport | None = None,
        layers: int = 0,
    ) -> None:
        self.asked = asked
        self.is_on: bool | None = is_on if transport is None else None
        self.why = why
        self.share: float | None = None  # of the time of experts and exchange that the latter took
        self._transport = transport
        self._layers = layers
        self._times: list[tuple[float, float]] = []  # of each layer: computing, exchanging

    def document(self) -> dict[str, Any]:
        """Return the fields for the JSON of a run."""
        return {"asked": self.asked, "is_on": self.is_on, "why": self.why, "share": self.share}

    @contextmanager
    def put_off(self) -> Iterator[None]:
        """Leave it undecided by forwards until the context is left, which are too short to tell."""
        is_on, self.is_on = self.is_on, bool(self.is_on)
        try:
            yield
        finally:
            self.is_on = is_on

    def note(self, computing: float, exchanging: float) -> None:
        """Take the seconds of a layer of the first forward; the last layer's decide.

        Every rank calls this for each layer.  The median over the layers counts: in the first one
        kernels may be compiled, and ranks connected.
        """
        self._times.append((computing, exchanging))
        if len(self._times) == self._layers:
            self._decide(*np.median(self._times, axis=0))

    def _decide(self, computing: float, exchanging: float) -> None:
        """Decide as all other ranks do, which have the same numbers.

        The rank that computes longest waits for nobody in the exchange.
        """
        assert self._transport is not None, "only its ranks decide"
        times = everyones(self._transport, [computing, exchanging])
        computing, exchanging = float(times[:, 0].max()), float(times[:, 1].min())
        self.share = exchanging / (computing + exchanging)
        self.is_on = self.share >= LEAST_SHARE and exchanging >= LEAST_SECONDS
        if not self.is_on:
            self.why = (
                f"the exchange took {1e3 * exchanging:.3g} ms of a layer, "
                f"{self.share:.0%} of the time of exchange and experts"
            )


def overlapping(
    asked: str, transport: Transport | None, blocks: Mapping[str, Exchanging]
) -> Overlap:
    """Return whether a model with these blocks overlaps, and tell them.

    Raise `Lfm2kitError` if it is asked to, and cannot.
    """
    overlap = _possible(asked, transport, blocks)
    for block in blocks.values():
        block.overlap = overlap
    return overlap


def _possible(asked: str, transport: Transport | None, blocks: Mapping[str, Exchanging]) -> Overlap:
    if asked == OFF:
        return Overlap(OFF)
    why = None
    if transport is None or not blocks:
        why = "no tokens travel between ranks"
    elif not all(isinstance(block.exchange, WorksInPieces) for block in blocks.values()):
        why = "the exchange cannot work beside a computation"
    if why is not None and asked == ON:
        raise Lfm2kitError(Option("overlap", ON), f": {why}; try ", Option("overlap", AUTO))
    if why is not None:
        return Overlap(asked, why=why)
    return (
        Overlap(ON, is_on=True)
        if asked == ON
        else Overlap(AUTO, transport=transport, layers=len(blocks))
    )
