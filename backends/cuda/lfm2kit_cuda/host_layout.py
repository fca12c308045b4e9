"""How a call's arrays lie in the host memory of a channel, and how many threads copy them.

They lie one behind the other.  Each begins a line, so no two of them share one: threads of the host
do not write a line that the device, or the thread of another array, writes.  channel.cu has the
same arithmetic, in vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lfm2kit_cuda.constants import CHANNEL

VECTOR = 16  # bytes
MOST_ARRAYS = 4
MOST_BYTES = 2**34  # of all arrays: kernels count vectors, and those of a grid more, with 31 bits
WARP, MOST_CTAS = 32, 16  # more would not fill the link any better


class Layout(NamedTuple):
    """The arrays that a call takes, or those that it returns."""

    starts: tuple[int, ...]  # bytes from the first array's start
    vectors: tuple[int, ...]  # of each of MOST_ARRAYS arrays; the last one need not be full
    places: int  # of vectors, those that only fill a line included

    @classmethod
    def of(cls, sizes: Sequence[int]) -> Layout:
        """Return the layout of arrays of these sizes in bytes.

        Raises ValueError if they are too many or too large.
        """
        if len(sizes) > MOST_ARRAYS or sum(sizes) > MOST_BYTES:
            raise ValueError(
                f"a call has at most {MOST_ARRAYS} arrays and {MOST_BYTES} bytes each way, "
                f"not {len(sizes)} arrays and {sum(sizes)} bytes"
            )
        vectors = [-(-size // VECTOR) for size in sizes]
        places = [-(-count // CHANNEL.LINE) * CHANNEL.LINE for count in vectors]
        starts = tuple(VECTOR * sum(places[:i]) for i in range(len(sizes)))
        return cls(starts, (*vectors, *(0,) * (MOST_ARRAYS - len(sizes))), sum(places))

    @property
    def nbytes(self) -> int:
        """Return the bytes of host memory that the arrays take."""
        return VECTOR * self.places


def sending_grid(places: int) -> tuple[int, int]:
    """Return the number of CTAs that copy this many vectors to the host, and of their threads.

    One CTA is best as long as it suffices, because several have to wait for each other.
    """
    threads = min(max(_whole_warps(places), WARP), CHANNEL.MOST_THREADS)
    return _ctas(places, threads), threads


def receiving_grid(places: int, workers: int) -> tuple[int, int]:
    """Return the same for copies from the host; each CTA has a thread for each worker.

    The link lets one CTA after the other look at the answers, and each look takes 2 us on an H200.
    So there are as few as can be, of threads that each have OF_THREAD loads on their way.
    """
    busy = _whole_warps(-(-places // CHANNEL.OF_THREAD))
    threads = min(max(busy, _whole_warps(workers), WARP), CHANNEL.MOST_THREADS)
    return _ctas(places, threads), threads


def _ctas(places: int, threads: int) -> int:
    return min(max(-(-places // (threads * CHANNEL.OF_THREAD)), 1), MOST_CTAS)


def _whole_warps(threads: int) -> int:
    return -(-threads // WARP) * WARP
