"""What a model remembers of sequences, and which batches may continue them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lfm2kit.backend import State
from lfm2kit.batch import Batch


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class ModelState:
    """What every layer's operator remembers of the sequences in its slots.

    A model takes the ones that its `new_state` returned: a copy with other numbers would have
    blocks write beyond what the layers hold.
    """

    slots: int
    max_tokens: int
    layers: list[State]
    seen: npt.NDArray[np.int32] = field(init=False, repr=False)  # tokens that each slot holds

    def __post_init__(self) -> None:
        object.__setattr__(self, "seen", np.zeros(self.slots, np.int32))

    def check(self, batch: Batch) -> None:
        """Raises ValueError if the host `batch` does not fit, or continues where no sequence is."""
        slots, starts = batch.state_slots, batch.starts
        if len(slots) and slots.max() >= self.slots:
            raise ValueError(f"a state slot lies outside the {self.slots} there are")
        if batch.max_context > self.max_tokens:
            raise ValueError(f"{batch.max_context} tokens do not fit in slots of {self.max_tokens}")
        is_wrong = (self.seen[slots] != starts) & (starts > 0)
        if is_wrong.any():
            slot, start = slots[is_wrong][0], starts[is_wrong][0]
            raise ValueError(
                f"a sequence starts at position {start}, but its slot {slot} has seen "
                f"{self.seen[slot]} tokens; start there, or at 0"
            )

    def forget(self, batch: Batch) -> None:
        """Marks the batch's slots as empty before a forward, which may fail half-way."""
        self.seen[batch.state_slots] = 0

    def advance(self, batch: Batch) -> None:
        """Records after a forward how many tokens the batch's slots hold."""
        ends = batch.cu_seqlens
        self.seen[batch.state_slots] = batch.starts + ends[1:] - ends[:-1]


def room(name: str, value: Any) -> int:
    """`value` as an int; ValueError where it is not a whole number of 0 or more."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
        raise ValueError(f"{name} is {value!r}, but must be a whole number of 0 or more")
    return int(value)
