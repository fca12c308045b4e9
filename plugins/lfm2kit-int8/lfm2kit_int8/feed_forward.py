"""Dense feed-forwards and experts of int8 weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lfm2kit import specs
from lfm2kit.backend import Weights
from lfm2kit_int8.formats import Float32
from lfm2kit_int8.packing import pack
from lfm2kit_int8.products import Int64, combine, product

Int32 = npt.NDArray[np.int32]


class FeedForwards:
    """Dense feed-forwards, of which each gets some of the rows."""

    def __init__(self, weights: Sequence[Weights]) -> None:
        self._w13 = pack([(one["w1.weight"], one["w3.weight"]) for one in weights])
        self._w2 = pack([(one["w2.weight"],) for one in weights])

    def __call__(self, x: Float32, rows: Int64, offsets: Int64) -> Float32:
        """Return what number g makes of x[rows[offsets[g] : offsets[g + 1]]], for all g."""
        inner = product(x, rows, offsets, self._w13)
        return product(inner, np.arange(len(rows)), offsets, self._w2)


class MLP:
    def __init__(self, spec: specs.MLP, weights: Weights) -> None:
        self._feed_forward = FeedForwards([weights])

    def __call__(self, x: Float32) -> Float32:
        return self._feed_forward(x, np.arange(len(x)), np.array([0, len(x)]))


class Experts:
    def __init__(self, spec: specs.Experts, weights: Weights) -> None:
        local = spec.local_experts
        self._count = len(local)
        self._numbers = np.full(spec.num_experts + 1, -1)  # the last one is that of the id -1
        self._numbers[list(local)] = np.arange(len(local))
        if local:
            self._experts = FeedForwards([weights.scope(f"experts.{e}") for e in local])

    def __call__(self, x: Float32, expert_ids: Int32, expert_weights: Float32) -> Float32:
        delta = np.empty_like(x)
        self.fill([delta], x, expert_ids, expert_weights)
        return delta

    def fill(
        self, results: Sequence[Float32], x: Float32, expert_ids: Int32, expert_weights: Float32
    ) -> None:
        (delta,) = results
        if not self._count:
            delta[...] = 0
            return
        rows, offsets, places = self._sorted(expert_ids)
        combine(self._experts(x, rows, offsets), places, expert_weights, delta)

    def _sorted(self, expert_ids: Int32) -> tuple[Int64, Int64, Int64]:
        """Sort the pairs (row, k) by expert, without those of other blocks' experts.

        Return each pair's row, where each expert's pairs begin [experts + 1], and the place of each
        pair among them [rows, k], which is -1 without one.
        """
        numbers = self._numbers[expert_ids.ravel()]
        counts = np.bincount(numbers[numbers >= 0], minlength=self._count)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        pairs = np.argsort(numbers, kind="stable")[numbers.size - offsets[-1] :]
        places = np.full(numbers.size, -1)
        places[pairs] = np.arange(len(pairs))
        return pairs // max(1, expert_ids.shape[1]), offsets, places.reshape(expert_ids.shape)
