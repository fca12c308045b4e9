"""Sequences that are fed to an operator in chunks, over a state with a slot for each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from lfm2kit.batch import Batch
from lfm2kit.specs import Layer, Spec
from lfm2kit.testing.compare import Result, each, rows_of
from lfm2kit.testing.host_block import HostBlock
from lfm2kit.testing.verdicts import CheckFailed

Float32 = npt.NDArray[np.float32]


class Session:
    """One state of a block, and how many tokens each of its slots has seen."""

    def __init__(self, spec: Spec, block: HostBlock, slots: int, max_tokens: int) -> None:
        self._spec = spec
        self._block = block
        self._state = block.new_state(slots, max_tokens)
        self._seen = dict.fromkeys(range(slots), 0)

    def feed(self, *chunks: tuple[int, Float32]) -> list[Result]:
        """One call with the next rows of some slots; the results of each."""
        slots = [slot for slot, _ in chunks]
        lengths = [len(rows) for _, rows in chunks]
        batch = Batch.of_sequences(
            [np.zeros(n, np.int32) for n in lengths],
            starts=[self._seen[s] for s in slots],
            slots=slots,
        )
        x = np.concatenate([rows for _, rows in chunks])
        result = _call(self._spec, self._block, x, batch, self._state)
        for slot, length in zip(slots, lengths, strict=True):
            self._seen[slot] += length
        ends = batch.cu_seqlens
        return [rows_of(result, slice(a, b)) for a, b in pairwise(ends)]

    def feed_in_chunks(self, slot: int, x: Float32, lengths: Sequence[int]) -> Result:
        """All rows of `x` to one slot, in a call for each chunk; the results joined."""
        ends = np.cumsum([0, *lengths])
        assert ends[-1] == len(x)
        chunks = (x[a:b] for a, b in pairwise(ends))
        return joined([self.feed((slot, chunk))[0] for chunk in chunks])

    def restart(self, slot: int) -> None:
        """The slot's next rows begin a new sequence; what it holds stays."""
        self._seen[slot] = 0


def one_shot(spec: Spec, block: HostBlock, x: Float32) -> Result:
    """The result of one forward over a whole sequence, without a state."""
    return _call(spec, block, x, Batch.of_sequences([np.zeros(len(x), np.int32)]), None)


def joined(results: Sequence[Result]) -> Result:
    """The results of consecutive chunks as one."""
    parts = [each(result) for result in results]
    arrays = tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return arrays if isinstance(results[0], tuple) else arrays[0]


def _call(spec: Spec, block: HostBlock, x: Float32, batch: Batch, state: Any) -> Result:
    inputs = (x, None) if isinstance(spec, Layer) else (x,)
    result: Result = block(*inputs, batch, state)
    if any(len(array) != batch.tokens for array in each(result)):
        raise CheckFailed(f"{spec}: {batch.tokens} rows in, {len(each(result)[0])} out")
    return result
