"""Runs the steps of an engine: chunks of sequences as a batch, and its forward on the state.

In a job of several ranks, rank 0 has the engine and sends each batch to the others, which `follow`:
so all ranks make the same forwards, each on a state of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import repeat
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lfm2kit.batch import Batch, Form
from lfm2kit.engine.room import room_for
from lfm2kit.engine.scheduler import Chunk
from lfm2kit.engine.sequence import UNKNOWN, Sequence
from lfm2kit.engine.sizes import size_for
from lfm2kit.memory import Array
from lfm2kit.model import LFM2
from lfm2kit.progress import step
from lfm2kit.ranks.agreement import least
from lfm2kit.state import ModelState, Room
from lfm2kit.transport import Transport

Floats = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]

THE_END = np.empty(0, np.int32)
# What rank 0 does between two steps, and the seconds that whoever watches the job lets it do so:
# users may think for long.
WAITING = "waiting for requests", 24 * 3600.0


class Scores(NamedTuple):
    """The logits after some positions of a prompt, which score the tokens that come next."""

    sequence: Sequence
    after: range  # positions
    logits: Floats  # [positions, vocab_size]


class Steps:
    """The forwards of one engine, and the state that they share."""

    def __init__(self, model: LFM2, room: Room, job: Transport | None = None) -> None:
        self._job = job if job is not None and job.world.size > 1 else None
        self.room = room if self._job is None else agreed(self._job, room)
        self._model = model
        self._state: ModelState | None = model.new_state(self.room)
        self._pads = self._job is None and model.is_captured and model.takes_padding
        if self._job is not None:
            step(*WAITING)

    @property
    def has_followers(self) -> bool:
        """Return whether other ranks make the same forwards."""
        return self._job is not None

    @property
    def may_be_left(self) -> bool:
        """Return whether a step may be left before its tokens are read."""
        return self._job is None and self._model.may_be_left

    def takes_ids(self, batch: Batch) -> bool:
        """Return whether a batch may have ids that only the model's memory has."""
        return self._state is not None and self._model.takes_ids(batch, self._state)

    def sized(self, batch: Batch) -> Batch:
        """Return the batch with padding rows, so that steps of decoding are captured in few sizes.

        Prompts get them as well, because the next step takes ids for as many rows as were drawn.
        Batches that have not one row of logits for each sequence are returned as they are, and so
        are those of models that capture nothing.
        """
        if not self._pads or batch.sequences != len(batch.logits_rows):
            return batch
        return batch.padded(batch.tokens + size_for(batch.sequences) - batch.sequences)

    @contextmanager
    def logits(self, batch: Batch, token_ids: Array | None = None) -> Iterator[Array]:
        """Give [len(batch.logits_rows), vocab_size], in the model's memory, for a sampler.

        They may still be computed; see `LFM2.logits_at_home`.
        """
        if self._job is not None:
            step("sending a batch")
            from_first(self._job, packed(batch))
        with self._model.logits_at_home(batch, self._state, token_ids) as logits:
            yield logits
        if self._job is not None:
            step(*WAITING)

    def scores(self, logits: Array, chunks: list[Chunk]) -> list[Scores]:
        """Return those rows of the logits that score tokens of prompts."""
        if not any(chunk.to_score for chunk in chunks):
            return []
        return list(scores_of(self._model.home.to_host(logits), chunks))

    def close(self) -> None:
        """Free the state, and let the other ranks go."""
        if self._job is not None:
            step("letting the other ranks go")
            from_first(self._job, THE_END)
        self._state = self._job = None


def follow(
    model: LFM2,
    job: Transport,
    room: Room | None = None,
    *,
    context: int | None = None,
    sequences: int | None = None,
) -> None:
    """Make the forwards of rank 0's engine on another rank, until that engine is closed.

    The room, or what it is made of, is what the engine is given.
    """
    state = model.new_state(agreed(job, room or room_for(model, context, sequences)))
    while len(batch := from_first(job, THE_END)):
        model.logits(unpacked(batch), state)


def batch_of(chunks: Iterable[Chunk]) -> Batch:
    """Return the batch of a step.

    It wants logits where a token is drawn: of the last token of a sequence, and of guesses; and of
    tokens that score a prompt.
    """
    chunks = list(chunks)
    starts = [chunk.sequence.computed for chunk in chunks]
    batch = Batch.of_sequences(
        [_ids_of(chunk) for chunk in chunks],
        starts=starts,
        pages=_table([chunk.sequence.pages for chunk in chunks]),
    )
    if any(chunk.guesses or chunk.to_score for chunk in chunks):
        return replace(batch, logits_rows=_rows_of(chunks, batch.logits_rows))
    is_last = [chunk.is_last for chunk in chunks]
    return batch if all(is_last) else replace(batch, logits_rows=batch.logits_rows[is_last])


def batch_after(chunks: Iterable[Chunk]) -> Batch:
    """Return the batch of the step after one whose tokens nobody has read: a token each.

    Its ids only stand for those tokens.
    """
    sequences = [chunk.sequence for chunk in chunks]
    return Batch.of_sequences(
        [UNKNOWN for _ in sequences],
        starts=[len(sequence.ids) for sequence in sequences],
        pages=_table([sequence.pages for sequence in sequences]),
    )


def _ids_of(chunk: Chunk) -> Int32:
    start = chunk.sequence.computed
    ids = chunk.sequence.ids[start : start + chunk.tokens]
    return np.concatenate([ids, np.array(chunk.guesses, np.int32)]) if chunk.guesses else ids


def _rows_of(chunks: Iterable[Chunk], last_rows: Int32) -> Int32:
    """Return the rows of a batch whose logits are wanted, given the last row of each chunk."""
    rows: list[int] = []
    for chunk, end in zip(chunks, last_rows.tolist(), strict=True):
        last = end - len(chunk.guesses)
        first = last + 1 - chunk.tokens - chunk.sequence.computed  # of the sequence's position 0
        rows += [first + position for position in chunk.to_score]
        rows += range(last, end + 1) if chunk.is_last else []
    return np.array(rows, np.int32)


def scores_of(logits: Floats, chunks: Iterable[Chunk]) -> Iterator[Scores]:
    """Yield the rows that score tokens of prompts, for each sequence that has any."""
    begin = 0
    for chunk in chunks:
        if after := chunk.to_score:
            yield Scores(chunk.sequence, after, logits[begin : begin + len(after)])
        begin += len(after) + chunk.is_last * (1 + len(chunk.guesses))


def _table(rows: list[list[int]]) -> Int32:
    """Return lists of pages as one table, padded with -1; a batch takes longer to make one.

    Its width is a power of two, so that a captured step serves sequences that take more pages.
    """
    width = 1 << (max(map(len, rows)) - 1).bit_length()
    return np.array([[*pages, *repeat(-1, width - len(pages))] for pages in rows], np.int32)


def agreed(job: Transport, room: Room) -> Room:
    """Return the smallest room that a rank of a job has; every rank calls it."""
    return replace(room, pages=least(job, room.pages))


def packed(batch: Batch) -> Int32:
    """Return a host batch as one array: its form, and then its arrays."""
    return np.concatenate([np.array(batch.form, np.int32), batch.packed()])


def unpacked(array: Int32) -> Batch:
    """Return the batch that was packed."""
    form = Form(*array[:5].tolist())
    shapes = [form.tokens, form.tokens, form.sequences + 1, form.sequences * form.width]
    token_ids, positions, cu_seqlens, pages, logits_rows = np.split(array[5:], np.cumsum(shapes))
    table = pages.reshape(form.sequences, form.width)
    return Batch(token_ids, positions, cu_seqlens, table, logits_rows, form.max_seqlen)


def from_first(job: Transport, mine: Int32) -> Int32:
    """Return rank 0's array on every rank, int32 [n]; the others bring an empty one."""
    size = job.world.size
    received, _ = job.all_to_all(np.tile(mine, size), [len(mine)] * size)
    return received
