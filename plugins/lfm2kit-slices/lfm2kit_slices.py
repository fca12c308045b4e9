"""A rewrite: dense feed-forwards are computed for a few rows at a time.

lfm2kit run --rewrite slices -v
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

import lfm2kit
from lfm2kit.backend import HOST, Block, Memory
from lfm2kit.rewrites import Join, replaced
from lfm2kit.specs import MLP, Model, Part, Spec

ROWS = 256


@dataclass(frozen=True, slots=True)
class SlicedMLP(Spec):
    """(x) -> delta, as `MLP`, computed for `rows` rows at a time."""

    mlp: MLP
    rows: int = ROWS
    kind: ClassVar[str] = "mlp"

    def parts(self) -> tuple[Part, ...]:
        return (Part("slice", "", self.mlp),)

    def note(self) -> str:
        return f"computed for {self.rows} rows at a time"


class SlicedBlock:
    """A block made of the block of an `MLP`, which any backend may have built."""

    def __init__(self, spec: SlicedMLP, slice: Block) -> None:
        self.rows = spec.rows
        self.slice = slice

    def __call__(self, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        delta = np.empty_like(x)
        for start in range(0, len(x), self.rows):
            rows = slice(start, start + self.rows)
            delta[rows] = self.slice(x[rows])
        return delta


def apply(model: Model) -> Model:
    """Return the model with a `SlicedMLP` in the place of each `MLP`."""
    sliced: Model = replaced(model, lambda spec: SlicedMLP(spec) if type(spec) is MLP else spec)
    return sliced


def join(surroundings: Memory) -> Join:
    """Return how a `SlicedMLP` is made: in the host's memory, whatever surrounds it."""
    return Join(SlicedBlock, HOST)


@lfm2kit.hookimpl
def lfm2kit_rewrites() -> Iterator[lfm2kit.Rewrite]:
    summary = f"Compute dense feed-forwards for {ROWS} rows at a time."
    yield lfm2kit.Rewrite("slices", summary, apply, {SlicedMLP: join})
