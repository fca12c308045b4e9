"""Predicts a forward in which device, link and host work at the same time.

The link carries experts during the whole forward, as far ahead as there are slots.  The host
computes only while the device works on the same layer.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

# The host's memory limits it if its rows take less than this times what one row of each takes.
NEAR_ONE_ROW = 1.25


class Limit(enum.StrEnum):
    """What a layer's end waits for."""

    DEVICE = "device"
    LINK = "link"
    HOST_COMPUTE = "host's arithmetic"
    HOST_MEMORY = "host's memory"


class LayerTime(NamedTuple):
    """A layer's predicted time, and what its end waits for."""

    seconds: float
    limit: Limit


@dataclass(frozen=True, slots=True)
class Slots:
    """Memory of the device that streamed experts pass through."""

    count: int = 0
    experts: int = 0  # in each, which are sent at once

    @property
    def size(self) -> int:
        """Return how many experts the slots hold together."""
        return self.count * self.experts


NO_SLOTS = Slots()


class Work(NamedTuple):
    """The expected seconds of a layer's experts, each where it is."""

    host: float
    host_reading: float  # if each expert on the host that is used had one row
    resident: float
    streamed: Sequence[float]  # of each, on the device
    trip: float = 0.0  # of what the host is given, and returns


def layer_times(
    works: Sequence[Work], rest: Sequence[float], transfer: float, slots: Slots
) -> list[LayerTime]:
    """Return the times of a forward's layers.

    `rest` has the device's seconds for everything before a layer's experts, and `transfer` is how
    long the link takes for an expert.  The experts of a slot are sent when those before them have
    arrived and the slot is free.  The device computes a layer's resident experts first, and then
    each slot's when they have arrived.
    """
    free = deque([0.0] * slots.count)  # when each slot will be, the first one first
    link = end = 0.0
    times: list[LayerTime] = []
    for work, before in zip(works, rest, strict=True):
        begin, start = end, end + before
        device, waits = start + work.resident, False
        host = start + work.trip + work.host if work.host else start
        for first in range(0, len(work.streamed), slots.experts or 1):
            sent = work.streamed[first : first + slots.experts]
            link = max(link, free.popleft()) + len(sent) * transfer
            waits = link > device
            device = max(device, link) + sum(sent)
            free.append(device)
        end = max(device, host)
        times.append(LayerTime(end - begin, _limit(work, host > device, waits)))
    return times


def _limit(work: Work, is_host: bool, waits: bool) -> Limit:
    if not is_host:
        return Limit.LINK if waits else Limit.DEVICE
    reads = work.host < NEAR_ONE_ROW * work.host_reading
    return Limit.HOST_MEMORY if reads else Limit.HOST_COMPUTE
