"""Which rows of the flat `[tokens, hidden_size]` tensors belong to which sequence.

There is no padding and no ambient context: a block that needs to know about sequences is
given a `Batch`.  The known ShortConv bugs of other libraries are all implicit batch state.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lfm2kit.memory import HOST, Memory


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The rows of one forward.  The arrays lie in `memory`; the integers are always on the host.

    A sequence whose first row has position 0 starts afresh, whatever its state slot holds; a
    sequence that starts at position p > 0 goes on from the p tokens its slot has seen.
    """

    token_ids: Any  # int32 [tokens]
    positions: Any  # int32 [tokens], of each row within its own sequence
    cu_seqlens: Any  # int32 [sequences + 1], row where each sequence starts; the last is `tokens`
    state_slots: Any  # int32 [sequences], the slot of the operators' state that a sequence uses
    logits_rows: Any  # int32 [logits], the rows whose logits are wanted
    max_seqlen: int  # rows of the longest sequence; 0 in an empty batch
    max_context: int  # 1 + the highest position; 0 in an empty batch
    memory: Memory = HOST
    # What was made of this batch: by a memory's name the same there, else fewer of its rows.
    views: dict[Hashable, Batch] = field(default_factory=dict, repr=False)

    @property
    def tokens(self) -> int:
        return int(self.token_ids.shape[0])

    @property
    def sequences(self) -> int:
        return int(self.state_slots.shape[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """What a captured forward depends on: equal shapes may share one."""
        host = self.on(HOST)
        return (self.sequences, *host.cu_seqlens.tolist(), *host.logits_rows.tolist())

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
        """
        chunks = [np.asarray(sequence, dtype=np.int32).reshape(-1) for sequence in sequences]
        if any(len(chunk) == 0 for chunk in chunks):
            raise ValueError("a sequence of no tokens has no last token")
        lengths = np.array([len(chunk) for chunk in chunks], dtype=np.int32)
        first = np.array(starts if starts is not None else [0] * len(chunks), dtype=np.int32)
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        positions = [start + np.arange(n) for start, n in zip(first, lengths, strict=True)]
        empty = np.empty(0, dtype=np.int32)
        return cls(
            token_ids=np.concatenate([empty, *chunks]),
            positions=np.concatenate([empty, *positions]).astype(np.int32),
            cu_seqlens=cu_seqlens,
            state_slots=np.array(slots if slots is not None else range(len(chunks)), np.int32),
            logits_rows=cu_seqlens[1:] - np.int32(1),
            max_seqlen=int(lengths.max(initial=0)),
            max_context=int((first + lengths).max(initial=0)),
        )

    def on(self, memory: Memory) -> Batch:
        """This batch with its arrays in `memory`; each copy is made once and remembered."""
        if memory.name == self.memory.name:
            return self
        if memory.name not in self.views:
            self.views.setdefault(self.memory.name, self)
            self.views[memory.name] = self._moved(memory)
        return self.views[memory.name]

    def trimmed(self, reach_in: int | None, reach_out: int | None) -> Batch:
        """Fewer rows, for an operator without state: each sequence from `reach_in` rows before its
        first one in `logits_rows` on, as a whole sequence; None: all rows, as they are.

        `logits_rows` are then its rows from `reach_out` before that one on; None: the same as ever.
        It depends on the shape alone, so its token ids mean nothing; made once and remembered.
        """
        key = (reach_in, reach_out)
        if key not in self.views:
            self.views[key] = self.on(HOST)._narrowed(reach_in)._keeping(reach_out)
        return self.views[key].on(self.memory)

    def _narrowed(self, reach: int | None) -> Batch:
        if reach is None:
            return self
        rows = self._rows_from(reach)
        _, lengths = np.unique(self._sequence_of_rows()[rows], return_counts=True)
        narrowed = Batch.of_sequences([np.zeros(n) for n in lengths])
        logits_rows = np.searchsorted(rows, self.logits_rows).astype(np.int32)
        return replace(narrowed, logits_rows=logits_rows)

    def _keeping(self, reach: int | None) -> Batch:
        if reach is None:
            return self
        return replace(self, logits_rows=self._rows_from(reach), views={})

    def _rows_from(self, reach: int) -> npt.NDArray[np.int32]:
        """Each sequence's rows from `reach` before the first of its `logits_rows` on."""
        sequence = self._sequence_of_rows()
        first = np.full(self.sequences, self.tokens + reach)  # where none is wanted: out of reach
        np.minimum.at(first, sequence[self.logits_rows], self.logits_rows)
        return np.flatnonzero(np.arange(self.tokens) >= first[sequence] - reach).astype(np.int32)

    def _sequence_of_rows(self) -> npt.NDArray[np.intp]:
        return np.repeat(np.arange(self.sequences), np.diff(self.cu_seqlens))

    def _moved(self, memory: Memory) -> Batch:
        def move(array: Any) -> Any:
            return memory.from_host(self.memory.to_host(array))

        return replace(
            self,
            token_ids=move(self.token_ids),
            positions=move(self.positions),
            cu_seqlens=move(self.cu_seqlens),
            state_slots=move(self.state_slots),
            logits_rows=move(self.logits_rows),
            memory=memory,
            views=self.views,
        )
