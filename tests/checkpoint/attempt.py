"""Reading a file that may be refused, and the memory that it took."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from lfm2kit.errors import Lfm2kitError
from lfm2kit.weights import Tensor

A_LITTLE = 2_000_000  # bytes of memory: what reading a small file may take, lies or not

Content = dict[str, tuple[str, tuple[int, ...], bytes]]


def content(tensors: Mapping[str, Tensor]) -> Content:
    """Return what can be compared: types, shapes and bits."""
    return {n: (str(t.format), t.shape, t.data.tobytes()) for n, t in tensors.items()}


class Attempt(NamedTuple):
    """The result of reading a file."""

    tensors: Content | None
    error: str  # the sentence that refuses it; any other exception is the test's failure
    peak: int  # bytes that Python and NumPy held at most

    @classmethod
    def to(cls, read: Callable[[Path], Mapping[str, Tensor]], path: Path) -> Attempt:
        tensors, error = None, ""
        tracemalloc.start()
        try:
            tensors = content(read(path))
        except Lfm2kitError as refusal:
            error = str(refusal)
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        return cls(tensors, error, peak)


def assert_refused(
    read: Callable[[Path], Mapping[str, Tensor]], path: Path, words: list[str]
) -> None:
    """Check that one short sentence refuses, with the path and all the words in it."""
    attempt = Attempt.to(read, path)
    assert attempt.tensors is None
    for word in [str(path), *words]:
        assert word in attempt.error
    assert len(attempt.error) < len(str(path)) + 300


def assert_refused_with_little_memory(
    read: Callable[[Path], Mapping[str, Tensor]], path: Path
) -> None:
    attempt = Attempt.to(read, path)
    assert attempt.tensors is None
    assert attempt.peak < A_LITTLE
