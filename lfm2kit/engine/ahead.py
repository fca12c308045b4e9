"""Steps that begin before the tokens of the step before are read (decision 0045).

Their ids go from the sampler to the next batch where the model is, and the host reads them
afterwards.  A sequence may turn out to have ended then: its row of the step that has begun is
nobody's.  All work is done in its order, so pages that are freed meanwhile are written in time.
"""

from __future__ import annotations

from collections.abc import Sequence as List
from contextlib import suppress
from itertools import repeat
from typing import Any, NamedTuple

from lfm2kit.batch import Batch
from lfm2kit.engine.drawing import Drawing, Drawn, DrawsAhead, NotANumber, Row, Sampler
from lfm2kit.engine.scheduler import Chunk, Scheduler
from lfm2kit.engine.sequence import UNKNOWN
from lfm2kit.engine.steps import Steps, batch_after, batch_of
from lfm2kit.memory import Array


class Begun(NamedTuple):
    """A step that has begun: its chunks, and the token that is being drawn after each."""

    chunks: List[Chunk]
    drawing: Drawing


class Failed(NamedTuple):
    """The drawing of a step that could not begin; it raises where tokens would be read."""

    error: Exception
    token_ids: Array = None

    def end(self) -> Any:
        raise self.error


class Ahead:
    """The step of an engine that has begun, if there is one."""

    def __init__(self, steps: Steps, sampler: Sampler, scheduler: Scheduler) -> None:
        self._steps = steps
        self._scheduler = scheduler
        is_ahead = isinstance(sampler, DrawsAhead) and steps.may_be_left
        self._sampler: Any = sampler if is_ahead else None
        self._begun: Begun | None = None

    @property
    def chunks(self) -> List[Chunk]:
        """Return the chunks of the step that has begun whose sequences still run."""
        if self._begun is None:
            return []
        return [chunk for chunk in self._begun.chunks if chunk.sequence.pages]

    def begin(self, chunks: List[Chunk]) -> bool:
        """Begin a step, if it is one that needs nothing but the tokens; return whether it is."""
        if self._sampler is None or not all(map(_needs_tokens_alone, chunks)):
            return False
        rows = [chunk.sequence.row() for chunk in chunks]
        self._begun = self._begin(chunks, self._steps.sized(batch_of(chunks)), rows)
        return True

    def read(self) -> list[tuple[Chunk, Drawn | NotANumber]]:
        """Begin the next step if it can be; then return the tokens of the one that had begun.

        Sequences that have ended meanwhile, or were put back, are left out.
        """
        begun = self._begun
        assert begun is not None, "no step has begun"
        self._begun = self._after(begun)
        drawn = begun.drawing.end()[: len(begun.chunks)]  # padding rows come last
        pairs = zip(begun.chunks, drawn, strict=True)
        return [(chunk, token) for chunk, token in pairs if chunk.sequence.pages]

    def drop(self) -> None:
        """Wait for the step that has begun; nobody gets its tokens, or its error."""
        begun, self._begun = self._begun, None
        if begun is not None:
            with suppress(Exception):
                begun.drawing.end()

    def _after(self, begun: Begun) -> Begun | None:
        """Begin the step after another one; None if it needs what nobody knows yet."""
        if isinstance(begun.drawing, Failed):
            return None
        chunks = self._scheduler.plan_after(begun.chunks)
        if not chunks:
            return None
        batch = self._steps.sized(batch_after(chunks))
        if not self._steps.takes_ids(batch):
            return None
        rows = [chunk.sequence.row(guessed=UNKNOWN) for chunk in chunks]
        try:
            return self._begin(chunks, batch, rows, begun.drawing.token_ids)
        except Exception as error:
            return Begun(chunks, Failed(error))

    def _begin(
        self, chunks: List[Chunk], batch: Batch, rows: List[Row], newest: Array | None = None
    ) -> Begun:
        asked = [*rows, *repeat(None, len(batch.logits_rows) - len(rows))]
        with self._steps.logits(batch, newest) as logits:
            return Begun(chunks, self._sampler.begin(logits, asked, newest))


def _needs_tokens_alone(chunk: Chunk) -> bool:
    """Return whether a token is drawn after a chunk, and the next one needs nothing but its id."""
    sequence, request = chunk.sequence, chunk.sequence.request
    is_read = request.constraint or sequence.guessing or request.logprobs is not None
    return chunk.is_last and not chunk.to_score and not is_read
