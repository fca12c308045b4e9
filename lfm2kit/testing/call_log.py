"""Which call of a block on trial was the last one, for what a failure says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lfm2kit.batch import Batch
from lfm2kit.specs import Spec

SHOWN = 8  # of the sequences of a batch


@dataclass(slots=True)
class CallLog:
    """A record of the newest call of a backend's blocks, or of the block that is built since."""

    spec: Spec | None = None
    number: int = 0  # of the calls of its block, from 1; 0: it was built, and not called yet
    inputs: Sequence[Any] = ()
    has_looked: bool = False  # whether the check has asked which blocks there are
    specs: list[Spec] = field(default_factory=list)  # of all blocks, in the order of building

    def built(self, spec: Spec) -> None:
        self.specs.append(spec)
        self.spec, self.number, self.inputs = spec, 0, ()

    def called(self, spec: Spec, number: int, inputs: Sequence[Any]) -> None:
        """Note a call with these arguments, which lie on the host."""
        self.spec, self.number, self.inputs = spec, number, inputs

    def note(self) -> str | None:
        """Return the last call in words: its block, rows, sequences and pages."""
        if self.spec is None:
            return None
        if not self.number:
            return f"last block: {self.spec}, not called yet"
        return f"last call: number {self.number} of {self.spec}{arguments_in_words(self.inputs)}"


def arguments_in_words(inputs: Sequence[Any]) -> str:
    """Return the sizes of a call's arguments: ", 5 rows, lengths [3, 2], with a state"."""
    rows = next((f", {len(x)} rows" for x in inputs if isinstance(x, np.ndarray)), "")
    batches = [i for i, value in enumerate(inputs) if isinstance(value, Batch)]
    if not batches:
        return rows
    (at,) = batches
    has_state = any(value is not None for value in inputs[at + 1 :])
    return rows + _sequences(inputs[at]) + (", with a state" if has_state else "")


def _sequences(batch: Batch) -> str:
    said = f", lengths {_brief(np.diff(batch.cu_seqlens).tolist())}"
    if not batch.pages.size:
        return said
    pages = [_brief([p for p in table if p >= 0]) for table in batch.pages.tolist()]
    return f"{said}, starts {_brief(batch.starts.tolist())}, pages {_brief(pages)}"


def _brief(values: Sequence[Any]) -> str:
    shown = ", ".join(map(str, values[:SHOWN]))
    return f"[{shown}]" if len(values) <= SHOWN else f"[{shown}, ... {len(values)} in all]"
