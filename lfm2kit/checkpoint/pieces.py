"""Makes tensors in pieces, in several threads, a few pieces ahead of the one being written.

In this way a checkpoint of any size takes little memory and uses all cores.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, TypeVar

import numpy as np

from lfm2kit.process.machine import cores

PIECE = 1 << 18  # elements: what is made of them stays in a core's own cache
MOST_THREADS = 16  # more are no faster: one thread writes

Task = TypeVar("Task")
Made = TypeVar("Made")


def threads() -> int:
    return min(MOST_THREADS, cores())


def in_order(make: Callable[[Task], Made], tasks: Iterable[Task]) -> Generator[Made]:
    """Yield `make(task)` for each task, in order, computed in threads a bounded number ahead.

    Close the iterator if it is not exhausted, to stop its threads.
    """
    count = threads()
    ahead: deque[Future[Made]] = deque()
    pool = ThreadPoolExecutor(count)
    try:
        for task in tasks:
            ahead.append(pool.submit(make, task))
            if len(ahead) > 2 * count:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def write_pieces(
    file: BinaryIO,
    pieces: Iterable[Any],
    dtype: np.dtype[Any],
    shape: Iterable[int],
) -> None:
    """Write a tensor's elements, which come in pieces of any shape."""
    count = 0
    for piece in pieces:
        assert piece.dtype == dtype, (piece.dtype, dtype)
        file.write(memoryview(piece.reshape(-1)).cast("B"))
        count += piece.size
    assert count == math.prod(shape), (count, shape)
