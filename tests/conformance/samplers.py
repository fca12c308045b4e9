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
    def draw(self, logits: Any, rows: Sequence[Row | None]) -> Any:
        drawn = super().draw(logits, rows)
        logits -= 1
        return drawn


class Forgets(NumPySampler):
    """Forgets something that rows ask for."""

    def __init__(self, **forgotten: Any) -> None:
        super().__init__()
        self._forgotten = forgotten

    def draw(self, logits: Any, rows: Sequence[Row | None]) -> Any:
        return super().draw(logits, [row and row._replace(**self._forgotten) for row in rows])


class CountsItsRows(NumPySampler):
    def draw(self, logits: Any, rows: Sequence[Row | None]) -> Any:
        counted = [row and row._replace(position=i) for i, row in enumerate(rows)]
        return super().draw(logits, counted)


class DrawsUnasked(NumPySampler):
    def draw(self, logits: Any, rows: Sequence[Row | None]) -> Any:
        some = next(row for row in rows if row is not None)
        return super().draw(logits, [row or some for row in rows])


class TakesNanForZero(NumPySampler):
    def draw(self, logits: Any, rows: Sequence[Row | None]) -> Any:
        return super().draw(np.nan_to_num(logits, nan=0, posinf=np.inf, neginf=-np.inf), rows)
