"""How long messages between ranks take: on one machine, and over the links between machines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lfm2kit.building.curves import Curve, Float64
from lfm2kit.building.rates import MADE_BY, Calibration
from lfm2kit.errors import Lfm2kitError, Option
from lfm2kit.memory import HOST
from lfm2kit.simulating.request import Request

LATENCY = 20e-6  # seconds of a message over a link of which only the rate is known
FAR = 2**40  # bytes: the other end of a line that stands for a link

Bytes = npt.NDArray[np.int64]


class Link(NamedTuple):
    """What carries the messages of an exchange that leave a rank, or a machine.

    Their latencies overlap, and their bytes follow each other.
    """

    call: Curve  # seconds of an exchange, by the bytes of each message
    messages: int = 1  # that crossed the link in it

    @classmethod
    def of(cls, latency: float, per_second: float) -> Link:
        """Return a link that takes `latency` for an exchange, and the time of its bytes."""
        return cls(Curve((1, FAR), (latency + 1 / per_second, latency + FAR / per_second)))

    def seconds(self, nbytes: Float64) -> Float64:
        """Return how long an exchange takes that brings these bytes over the link."""
        return self.call.at(nbytes / self.messages) * (nbytes > 0)


class Network(NamedTuple):
    """The links of a job's machines: `inside` is a rank's own, `between` that of a machine."""

    inside: Callable[[], Link]  # raises `Lfm2kitError` if it is not known
    between: Callable[[], Link]

    def seconds(self, nbytes: Bytes, nodes: Sequence[int]) -> Float64:
        """Return how long each rank takes to send and receive messages, [ranks].

        `nbytes` are those of each rank's message to each other one, [from, to], and `nodes` the
        machines of the ranks.  Links carry both directions at once, and machines share theirs.
        """
        node = np.array(nodes)
        is_inside = node[:, None] == node
        inside = self._worse(nbytes * is_inside, np.arange(len(node)), self.inside)
        between = self._worse(nbytes * ~is_inside, node, self.between)
        slowest: Float64 = np.maximum(inside, between)
        return slowest

    def _worse(
        self, nbytes: Bytes, place: npt.NDArray[np.intp], link: Callable[[], Link]
    ) -> Float64:
        """Return the longer of both directions over the link of each rank's place, [ranks]."""
        if not nbytes.any():
            return np.zeros(len(place))
        ways = [np.bincount(place, nbytes.sum(axis=axis)) for axis in (0, 1)]
        longer: Float64 = link().seconds(np.maximum(*ways))[place]
        return longer


def past_host(calibration: Calibration, memory: str, ranks: int) -> Curve | None:
    """Return the seconds of a layer's exchange between devices of one machine, if it was measured.

    They are those among about as many ranks as are on a machine, by the bytes that a rank sends to
    all others: its own links to the switch carry these, to however many ranks they go.
    """
    there = (one for one in calibration.exchanges if one.key[1:] == (1, memory))
    nearest = min(there, key=lambda one: abs(one.key.ranks - ranks), default=None)
    if nearest is None or memory == HOST.name:
        return None
    others = nearest.key.ranks - 1
    return replace(nearest.call, sizes=tuple(others * size for size in nearest.call.sizes))


def network(request: Request, calibration: Calibration, rates: str) -> Network:
    """Return the links that are asked for; of what is not, those that were measured.

    `rates` is what errors call the calibration.
    """
    on_host = [one for one in calibration.exchanges if one.key.memory == HOST.name]
    apart = [one for one in on_host if one.key.machines > 1]
    near = [one for one in on_host if one.key.machines == 1]

    def between() -> Link:
        if request.link is not None:
            measured = min((one.call.seconds[0] for one in apart), default=LATENCY)
            return Link.of(request.latency or measured, request.link)
        if not apart:
            raise Lfm2kitError(
                f"{rates}: there is no exchange between machines; give its link, such as "
                "link=25Gbit, or measure with lfm2kit calibrate on several of them"
            )
        key, call = (one := max(apart, key=lambda one: one.key)).key, one.call
        there = key.ranks // key.machines
        return Link(call, there * (key.ranks - there))

    def inside() -> Link:
        if not near:
            raise Lfm2kitError(
                f"{rates}: there is no exchange between ranks of one machine; {MADE_BY} ",
                Option("ranks", max(2, request.per_node)),
            )
        one = min(near, key=lambda one: abs(one.key.ranks - request.per_node))
        return Link(one.call, one.key.ranks - 1)

    return Network(inside, between)
