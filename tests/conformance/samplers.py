"""Samplers of backends, each of which draws wrong tokens, or writes where it must not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lfm2kit.engine.drawing import NumPySampler, Row
from lfm2kit.reference.backend import ReferenceBackend


class Sampling(ReferenceBackend):
    """The reference with a sampler of its own."""

    def __init__(self, sampler: Any) -> None:
        super().__init__()
        self._sampler = sampler

    def sampler(self) -> Any:
        return self._sampler


class Writes(NumPySampler):
    def draw(self, logits: Any, rows: Sequence[Row]) -> Any:
        drawn = super().draw(logits, rows)
        logits -= 1
        return drawn


class Forgets(NumPySampler):
    """Forgets something that rows ask for."""

    def __init__(self, **forgotten: Any) -> None:
        self._forgotten = forgotten

    def draw(self, logits: Any, rows: Sequence[Row]) -> Any:
        return super().draw(logits, [row._replace(**self._forgotten) for row in rows])


class CountsItsRows(NumPySampler):
    def draw(self, logits: Any, rows: Sequence[Row]) -> Any:
        return super().draw(logits, [row._replace(position=i) for i, row in enumerate(rows)])


class TakesNanForZero(NumPySampler):
    def draw(self, logits: Any, rows: Sequence[Row]) -> Any:
        return super().draw(np.nan_to_num(logits, nan=0, posinf=np.inf, neginf=-np.inf), rows)
