"""A backend whose experts read rows of 16 bits, as those of GPUs do."""

from __future__ import annotations

from typing import Any

import numpy as np

from lfm2kit.backend import F32, Block, Format, Spec, Weights
from lfm2kit.formats import rounded
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.specs import Experts


class RoundingBackend(ReferenceBackend):
    """The reference, but for experts that round what they read, and note the types of it."""

    def __init__(self, format: Format) -> None:
        self.format = format
        self.types: set[np.dtype[Any]] = set()

    def row_format(self, spec: Spec) -> Format:
        return self.format if isinstance(spec, Experts) else F32

    def build(self, spec: Spec, weights: Weights) -> Block:
        block = super().build(spec, weights)
        return self._rounding(block) if isinstance(spec, Experts) else block

    def _rounding(self, block: Block) -> Block:
        def experts(x: Any, expert_ids: Any, expert_weights: Any) -> Any:
            self.types.add(x.dtype)
            rows = x if x.dtype == self.format.block else rounded(x, self.format)
            return block(self.format.unpack(rows), expert_ids, expert_weights)

        return experts


class Silent(RoundingBackend):
    """The same, which does not say in which format its experts read rows."""

    row_format = None  # type: ignore[assignment]
