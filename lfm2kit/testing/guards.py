"""Arrays between margins, by which a block that goes beyond its arguments or weights shows itself.

What it reads there is NaN, and no number that happens to do, or a 1 among integers: wrong, but an
index that crashes nothing.  What it writes there is seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lfm2kit.batch import Batch
from lfm2kit.batch_rules import ARRAYS
from lfm2kit.testing.verdicts import CheckFailed
from lfm2kit.weights import Tensor

Named = tuple[str, Any]

MARGIN = 64  # bytes on either side, a vector of the widest CPU
NAN = b"\xed\x7f" * MARGIN  # in float16, bfloat16 and float32
ONES = np.ones(MARGIN, np.int32).tobytes()


def guarded(array: npt.NDArray[Any], skew: int = 0) -> npt.NDArray[Any]:
    """Return a copy of `array` between margins, `skew` bytes beyond an aligned address."""
    margin = MARGIN + skew
    owner = np.empty(array.nbytes + 2 * margin, np.uint8)
    beside = np.frombuffer(_pattern(array), np.uint8, margin)
    owner[:margin] = owner[owner.nbytes - margin :] = beside
    copy: npt.NDArray[Any] = np.ndarray(array.shape, array.dtype, owner, margin)
    copy[...] = array
    return copy


def _pattern(array: npt.NDArray[Any]) -> bytes:
    return ONES if array.dtype == np.int32 else NAN


def guarded_batch(batch: Batch) -> Batch:
    """Return a copy of a host batch, each of its arrays between margins."""
    return batch.unchecked(**{name: guarded(getattr(batch, name)) for name in ARRAYS})


class GuardedTensors(Mapping[str, Tensor]):
    """Read-only copies of tensors between margins, each made when it is first read.

    Skewed ones lie one element beyond an aligned address.
    """

    def __init__(self, tensors: Mapping[str, Tensor], is_skewed: bool = False) -> None:
        self._tensors = tensors
        self._is_skewed = is_skewed
        self._copies: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._copies:
            self._copies[name] = _guarded_tensor(self._tensors[name], self._is_skewed)
        return self._copies[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def arrays(self) -> Iterator[Named]:
        """Yield every array that was read, with words for it."""
        for name, tensor in list(self._copies.items()):
            yield from ((f"weight '{name}'", array) for array in tensor.arrays)


def _guarded_tensor(tensor: Tensor, is_skewed: bool) -> Tensor:
    data, *beside = (guarded(array, is_skewed * array.itemsize) for array in tensor.arrays)
    for array in (data, *beside):
        array.flags.writeable = False
    return Tensor(tensor.name, tensor.format, tensor.shape, data, tuple(beside))


def arrays_of_arguments(inputs: Iterable[Any]) -> Iterator[Named]:
    """Yield the arrays among the arguments of a block, and those of its batch; not its state."""
    for i, value in enumerate(inputs):
        if isinstance(value, Batch):
            yield from ((f"batch.{name}", getattr(value, name)) for name in ARRAYS)
            return  # what follows a batch is the state
        if value is not None:
            yield f"argument {i}", value


def require_whole_margins(arrays: Iterable[Named], what: str) -> None:
    """Raise `CheckFailed` if somebody wrote beside one of these guarded arrays."""
    for name, array in arrays:
        owner = array.base
        margin = (owner.nbytes - array.nbytes) // 2
        for side, beside in (("before", owner[:margin]), ("behind", owner[-margin:])):
            if beside.tobytes() != _pattern(array)[:margin]:
                raise CheckFailed(f"{what}: it wrote outside of its arrays, just {side} {name}")
