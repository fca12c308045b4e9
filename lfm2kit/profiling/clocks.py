"""How far the clocks of ranks are apart, so that their spans can be drawn on one time line.

Ranks of one machine share a clock.  Between machines, barriers bound the difference: no rank leaves
a barrier before the last one has entered it.  If rank r enters at b(r) and leaves at e(r) by its
own clock, then this clock is ahead of rank 0's by at least b(r) - e(0), and by at most e(r) - b(0).
The estimate is the middle of what many barriers leave of that.  It is wrong by half of the width at
most, as in Cristian, "Probabilistic clock synchronization" (1989).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lfm2kit.transport import Transport, everyones

BARRIERS = 20


class Ahead(NamedTuple):
    """The seconds that a rank's clock is ahead of rank 0's, and by how much they may be wrong."""

    seconds: float = 0.0
    error: float = 0.0


def clocks_of(transport: Transport, clock: Callable[[], float] = time.perf_counter) -> list[Ahead]:
    """Return how far each rank's clock is ahead, [ranks]; every rank calls this."""
    moments = np.zeros((BARRIERS, 2))
    for moment in moments:
        moment[0] = clock()
        transport.barrier()
        moment[1] = clock()
    return _ahead(everyones(transport, moments), transport.world.nodes)


def _ahead(moments: npt.NDArray[np.float64], nodes: Sequence[int]) -> list[Ahead]:
    """Return how far each rank's clock is ahead, by its moments [ranks, barriers, 2]."""
    enter, leave = moments[:, :, 0], moments[:, :, 1]
    least = (enter - leave[0]).max(axis=1)
    most = (leave - enter[0]).min(axis=1)
    machine = np.array(nodes or range(len(moments)))
    found = []
    for number in machine:
        if number == machine[0]:
            found.append(Ahead())
            continue
        low, high = least[machine == number].max(), most[machine == number].min()
        found.append(Ahead(float(low + high) / 2, float(high - low) / 2))
    return found
