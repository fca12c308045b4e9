"""A forward in two halves of its batch: one computes while the other's tokens travel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from lfm2kit.backend import Array, State
from lfm2kit.batch import Batch
from lfm2kit.errors import Lfm2kitError, Option
from lfm2kit.state import Room
from lfm2kit.steps import Steps, Times, alternately, finished, timed
from lfm2kit.transport import Aside, Exchange, Transport, WorksAside

ON, OFF, AUTO = "on", "off", "auto"
OVERLAP = (ON, OFF, AUTO)
LEAST_SHARE = 0.15  # of a layer's time that the exchange takes where overlap pays
# Seconds of a layer's exchange: a shorter one may take longer in a thread beside the computation.
LEAST_SECONDS = 2e-3


@dataclass(slots=True)
class Overlap:
    """Whether a model's forwards overlap exchange and computation, and why not."""

    asked: str
    is_on: bool | None  # None: the first forward decides
    why: str | None = None
    share: float | None = None  # of a layer's time that the exchange took in the first forward


def overlapping(
    asked: str,
    transport: Transport | None,
    exchanges: Mapping[str, Sequence[Exchange]],
    without_steps: Sequence[str],
) -> Overlap:
    """Return whether a model can overlap; `Lfm2kitError` if it is asked to, and cannot.

    Its blocks have these exchanges, by name.
    """
    if asked == OFF:
        return Overlap(OFF, is_on=False)
    why = _why_not(transport, exchanges, without_steps)
    if why is None:
        return Overlap(asked, is_on=True if asked == ON else None)
    if asked == ON:
        raise Lfm2kitError(Option("overlap", ON), f": {why}; try ", Option("overlap", AUTO))
    return Overlap(asked, is_on=False, why=why)


def _why_not(
    transport: Transport | None,
    exchanges: Mapping[str, Sequence[Exchange]],
    without_steps: Sequence[str],
) -> str | None:
    """Return why a model with these exchanges cannot overlap."""
    if transport is None or not exchanges:
        return "no tokens travel between ranks"
    if not isinstance(transport, WorksAside) or transport.aside() is None:
        return "the transport cannot work beside a computation"
    if without_steps:
        return f"{without_steps[0] or 'the model'} cannot be left while tokens travel"
    if any(len(of_block) < 3 for of_block in exchanges.values()):
        return "tokens travel through a device's memory"
    return None


def overlapped(forward: Any, transport: Transport | None, overlap: Overlap) -> Any:
    """Return the forward, in halves unless it is known that they do not overlap."""
    if overlap.is_on is False:
        return forward
    assert isinstance(transport, WorksAside), "as `overlapping` has seen"
    aside = transport.aside()
    assert aside is not None, "as `overlapping` has seen"
    return OverlappedForward(forward, transport, aside, overlap)


class OverlappedForward:
    """A model's forward, in halves where the exchange takes long enough to be hidden.

    The logits have the same bits.  Both halves are made on every rank, empty ones too, so that all
    ranks exchange in the same order.
    """

    timed = staticmethod(timed)

    def __init__(self, forward: Any, transport: Transport, aside: Aside, overlap: Overlap) -> None:
        self._forward = forward
        self._transport = transport
        self._aside = aside
        self.overlap = overlap

    def __call__(self, batch: Batch, state: Sequence[State] | None = None) -> Array:
        if self.overlap.is_on is None:
            result, times = self.timed(self.steps(batch, state))
            self._decide(times)
            return result
        if not self.overlap.is_on:
            return finished(self.steps(batch, state))
        parts = halves(batch)
        forwards = [self.steps(part, state) for part in parts]
        return _joined(batch, parts[0], *alternately(forwards, self._aside.begin))

    def steps(self, batch: Batch, state: Sequence[State] | None = None) -> Steps[Array]:
        steps: Steps[Array] = self._forward.steps(batch, state)
        return steps

    def new_state(self, room: Room) -> list[State]:
        states: list[State] = self._forward.new_state(room)
        return states

    def _decide(self, times: Times) -> None:
        """Decide as all other ranks do, which have the same numbers.

        The rank that computes longest waits for nobody in the exchange.
        """
        size = self._transport.world.size
        mine = np.array([of_a_layer(times)] * size)
        everyones, _ = self._transport.all_to_all(mine, [1] * size, [1] * size)
        computing, exchanging = float(everyones[:, 0].max()), float(everyones[:, 1].min())
        self.overlap.share = exchanging / (computing + exchanging)
        pays = self.overlap.share >= LEAST_SHARE and exchanging >= LEAST_SECONDS
        self.overlap.is_on = pays
        if not pays:
            self.overlap.why = (
                f"the exchange took {1e3 * exchanging:.2g} ms of a layer, "
                f"{self.overlap.share:.0%} of its time"
            )


def of_a_layer(times: Times) -> tuple[float, float]:
    """Return the median seconds of a layer's computation and of its exchange, of two calls each.

    A layer in which kernels are compiled does not count then.
    """
    computing, calls = ([a + b for a, b in zip(t[::2], t[1::2], strict=True)] for t in times)
    return median(computing), median(calls)


def halves(batch: Batch) -> tuple[Batch, Batch]:
    """Return a host batch in two, of whole sequences and about as many tokens; one may be empty."""
    starts: npt.NDArray[np.int32] = batch.cu_seqlens
    cut = int(np.abs(2 * starts.astype(np.int64) - batch.tokens).argmin())
    return _part(batch, slice(0, cut)), _part(batch, slice(cut, batch.sequences))


def _part(batch: Batch, sequences: slice) -> Batch:
    """Return the batch of some consecutive sequences, with their logits in the same order."""
    starts = batch.cu_seqlens[sequences.start : sequences.stop + 1]
    rows = slice(int(starts[0]), int(starts[-1]))
    wanted = batch.logits_rows
    wanted = wanted[(wanted >= rows.start) & (wanted < rows.stop)]
    return batch.unchecked(
        token_ids=batch.token_ids[rows],
        positions=batch.positions[rows],
        cu_seqlens=starts - starts[0],
        pages=batch.pages[sequences],
        logits_rows=wanted - starts[0],
        max_seqlen=int(np.diff(starts).max(initial=0)),
    )


def _joined(batch: Batch, first_half: Batch, first: Any, second: Any) -> Array:
    """Return the logits of both halves, in the order of the batch's `logits_rows`."""
    is_first = batch.logits_rows < first_half.tokens
    logits = np.empty((len(is_first), first.shape[1]), first.dtype)
    logits[is_first], logits[~is_first] = first, second
    return logits
