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
MOST_BYTES = 2**31 - 1  # of all arrays: kernels count vectors with 32 bits
WARP, MOST_CTAS = 32, 16  # more would not fill the link any better
RECEIVING_THREADS = 256  # of a CTA: several SMs take more from the link at once than one


class Layout(NamedTuple):
    """The arrays that a call takes, or those that it returns."""

    starts: tuple[int, ...]  # bytes from the first array's start
    vectors: tuple[int, ...]  # of each of MOST_ARRAYS arrays; the last one need not be full
    places: int  # of vectors, those that only fill a line included

    @classmethod
    def of(cls, sizes: Sequence[int]) -> Layout:
        """Return the layout of arrays of so many bytes.

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
    """Return the number of CTAs that copy so many vectors to the host, and of their threads.

    One CTA is best as long as it suffices, because several have to wait for each other.
    """
    return _grid(places, CHANNEL.MOST_THREADS, CHANNEL.OF_THREAD)


def receiving_grid(places: int, workers: int) -> tuple[int, int]:
    """Return the same for copies from the host; each CTA has a thread for each worker."""
    ctas, threads = _grid(places, RECEIVING_THREADS, 1)
    return ctas, max(threads, _whole_warps(workers))


def _grid(places: int, most_threads: int, of_thread: int) -> tuple[int, int]:
    threads = min(max(_whole_warps(places), WARP), most_threads)
    return min(max(-(-places // (threads * of_thread)), 1), MOST_CTAS), threads


def _whole_warps(threads: int) -> int:
    return -(-threads // WARP) * WARP
