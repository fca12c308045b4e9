"""Which router decisions are too close to be judged.

Where two experts' scores differ by less than rounding, either choice is right; and what follows
from the choice cannot be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from lfm2kit import specs
from lfm2kit.backend import Backend, Block
from lfm2kit.memory import Memory
from lfm2kit.specs import Spec
from lfm2kit.weights import Weights

Gaps = npt.NDArray[np.float64]
Rows = slice | npt.NDArray[np.intp]

NEAR_TIE = 1e-5  # a gap between two scores (with bias) that roundings in float32 may turn round


def selection_gaps(spec: specs.Router, weights: Weights, x: npt.NDArray[Any]) -> Gaps:
    """Return how close each row came to another selection or order: float64 [rows].

    The smallest difference between neighbours among the num_experts_per_tok + 1 highest scores.
    """
    logits = x.astype(np.float64) @ weights.float32("gate.weight").astype(np.float64).T
    return choice_gaps(spec.choice, weights, 1 / (1 + np.exp(-np.clip(logits, -700, 700))))


def choice_gaps(spec: specs.Choice, weights: Weights, scores: npt.NDArray[Any]) -> Gaps:
    """Return the same as `selection_gaps`, from the scores [rows, num_experts]."""
    biased = scores.astype(np.float64)
    if spec.use_expert_bias:
        biased = biased + weights.float32("expert_bias")
    highest = np.sort(biased, axis=1)[:, ::-1][:, : spec.num_experts_per_tok + 1]
    gaps: Gaps = np.min(-np.diff(highest, axis=1), axis=1, initial=np.inf)
    return gaps


def rows_among(clear: Rows, start: int, end: int) -> Rows:
    """Return those of the `clear` rows that are in a range, counted from its start."""
    if isinstance(clear, slice):
        return clear
    return clear[(start <= clear) & (clear < end)] - start


class GapWatch:
    """A backend that notes how close the routers it builds come to a tie."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.gaps: list[Gaps] = []  # one array [rows] for each call of a router or a choice

    def why_unsupported(self, spec: Spec) -> str | None:
        return self._backend.why_unsupported(spec)

    def memory(self, spec: Spec) -> Memory:
        return self._backend.memory(spec)

    def build(self, spec: Spec, weights: Weights) -> Block:
        block = self._backend.build(spec, weights)
        if isinstance(spec, specs.Router):
            return self._watched(block, partial(selection_gaps, spec, weights))
        if isinstance(spec, specs.Choice):
            return self._watched(block, partial(choice_gaps, spec, weights))
        return block

    def _watched(self, block: Block, gaps: Callable[[npt.NDArray[Any]], Gaps]) -> Block:
        def watched(rows: npt.NDArray[Any]) -> Any:
            self.gaps.append(gaps(rows))
            return block(rows)

        return watched

    def clear_rows(self, margin: float) -> Rows:
        """Return the rows that no router since `gaps` was cleared took within `margin` of a tie."""
        if not self.gaps:
            return slice(None)
        return np.flatnonzero(np.min(self.gaps, axis=0) > margin)
