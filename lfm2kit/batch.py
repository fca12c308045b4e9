"""Which rows of the flat `[tokens, hidden_size]` tensors belong to which sequence.

There is no padding and no ambient context: a block that needs to know about sequences is
given a `Batch`.  The known ShortConv bugs of other libraries are all implicit batch state.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from lfm2kit.batch_rules import ARRAYS, MOST_CONTEXT, check, check_slots, integers
from lfm2kit.memory import HOST, Memory


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The rows of one forward.  The arrays lie in `memory`; the integers are always on the host.

    A sequence whose first row has position 0 starts afresh, whatever its state slot holds; a
    sequence that starts at position p > 0 goes on from the p tokens its slot has seen.

    Raises ValueError, when it is made on the host, if a field is not as described here.  The arrays
    are not copied and not checked again, so they must not change.
    """

    token_ids: Any  # int32 [tokens]
    positions: Any  # int32 [tokens], of each row in its own sequence: consecutive, below 2^24
    cu_seqlens: Any  # int32 [sequences + 1], row where each sequence starts; the last is `tokens`
    state_slots: Any  # int32 [sequences], the slot of the operators' state; all different
    logits_rows: Any  # int32 [logits], the rows whose logits are wanted, in any order
    max_seqlen: int  # rows of the longest sequence; 0 in an empty batch
    max_context: int  # 1 + the highest position; 0 in an empty batch
    memory: Memory = HOST
    # Batches made from this one: copies by their memory's name, derived ones by their key.
    views: dict[Hashable, Batch] = field(default_factory=dict, repr=False, init=False)

    def __post_init__(self) -> None:
        if self.memory.name == HOST.name:
            check(self)

    @property
    def tokens(self) -> int:
        return int(self.token_ids.shape[0])

    @property
    def sequences(self) -> int:
        return int(self.state_slots.shape[0])

    @property
    def shape(self) -> tuple[bytes, ...]:
        """Everything but the ids; a captured forward may serve every batch of an equal shape."""
        host = self.on(HOST)
        arrays = host.positions, host.cu_seqlens, host.state_slots, host.logits_rows
        return tuple(array.tobytes() for array in arrays)

    @property
    def starts(self) -> Any:
        """The position of each sequence's first row, int32 [sequences], in the batch's memory."""
        is_decoding = self.tokens == self.sequences  # a row each
        return self.positions if is_decoding else self.positions[self.cu_seqlens[:-1]]

    @classmethod
    def of_sequences(
        cls,
        sequences: Sequence[npt.ArrayLike],
        *,
        starts: Sequence[int] | None = None,
        slots: Sequence[int] | None = None,
    ) -> Batch:
        """One batch of whole sequences, or of their next chunks, asking for each one's last logits.

        `starts[i]` is how many tokens of sequence i its slot has seen already (default 0);
        `slots[i]` its state slot (default i).

        Raises ValueError for an empty sequence, ids that are not integers, a negative start or
        slot, a slot that two sequences share, and a wrong number of starts or slots.
        """
        chunks = [_row_of_ids(sequence) for sequence in sequences]
        count = len(chunks)
        lengths = np.array([len(chunk) for chunk in chunks], np.int32)
        ends = np.zeros(count + 1, np.int32)
        lengths.cumsum(out=ends[1:])
        first = np.zeros(count, np.int32) if starts is None else _starts(starts, lengths)
        state_slots = np.arange(count, dtype=np.int32)
        if slots is not None:
            check_slots(state_slots := _one_each("slots", slots, count))
        rows = np.arange(ends[-1], dtype=np.int32)
        return _made(
            token_ids=np.concatenate(chunks) if chunks else rows,
            positions=rows + np.repeat(first - ends[:-1], lengths),
            cu_seqlens=ends,
            state_slots=state_slots,
            logits_rows=ends[1:] - np.int32(1),
            max_seqlen=int(lengths.max(initial=0)),
            max_context=int((first + lengths).max(initial=0)),
            memory=HOST,
            views={},
        )

    def on(self, memory: Memory) -> Batch:
        """This batch with its arrays in `memory`; each copy is made once and remembered."""
        if memory.name == self.memory.name:
            return self
        if memory.name not in self.views:
            self.views.setdefault(self.memory.name, self)
            self.views[memory.name] = self._moved(memory)
        return self.views[memory.name]

    def forget_views(self) -> None:
        """Frees the batches made from this one, without waiting for the garbage collector.

        A batch and its views refer to each other.
        """
        views = list(self.views.values())
        self.views.clear()
        for view in views:
            if view.views:
                view.forget_views()

    def derived(self, key: Hashable, make: Callable[[Batch], Batch]) -> Batch:
        """Returns the batch that `make` computes from this one on the host, in this one's memory.

        It is made once for each `key` and remembered.  Make the key a tuple that begins with an
        object of your own, such as a function: then neither another module nor a memory's name is
        equal to it.  What `make` returns may depend on everything but the token ids.
        """
        if key not in self.views:
            self.views[key] = make(self.on(HOST))
        return self.views[key].on(self.memory)

    def _moved(self, memory: Memory) -> Batch:
        def move(array: Any) -> Any:
            return memory.from_host(self.memory.to_host(array))

        arrays = {name: move(getattr(self, name)) for name in ARRAYS}
        moved = self.unchecked(**arrays, memory=memory, views=self.views)
        if memory.name == HOST.name:  # made elsewhere: the first time that its arrays can be read
            check(moved)
        return moved

    def unchecked(self, **changes: Any) -> Batch:
        """Returns a copy with these fields changed, without checking it."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return _made(**{**values, "views": {}, **changes})


def _made(**values: Any) -> Batch:
    """Makes a batch of these fields without checking it."""
    batch = object.__new__(Batch)
    for name, value in values.items():
        object.__setattr__(batch, name, value)
    return batch


def _row_of_ids(sequence: npt.ArrayLike) -> npt.NDArray[np.int32]:
    ids = integers("token ids", sequence)
    if ids.ndim != 1 or not len(ids):
        raise ValueError("a sequence is not a row of one or more token ids")
    return ids


def _starts(values: npt.ArrayLike, lengths: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    starts = _one_each("starts", values, len(lengths))
    is_within = (starts >= 0) & (starts <= MOST_CONTEXT - lengths)
    if not is_within.all():
        first = starts[~is_within][0]
        raise ValueError(
            f"a sequence cannot start at {first}: positions are 0 to {MOST_CONTEXT - 1}"
        )
    return starts


def _one_each(name: str, values: npt.ArrayLike, sequences: int) -> npt.NDArray[np.int32]:
    array = integers(name, values)
    if array.shape != (sequences,):
        raise ValueError(f"{name} of shape {array.shape} for {sequences} sequences")
    return array.copy()
