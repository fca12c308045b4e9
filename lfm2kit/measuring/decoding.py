"""Decoding to be timed: step after step, after contexts of some length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from lfm2kit.batch import Batch
from lfm2kit.measuring.given_texts import NONE, GivenText, most_rows
from lfm2kit.model import LFM2
from lfm2kit.state import Room

PROMPT_TOKENS = 4096  # of all sequences, in a forward that computes contexts

Int32 = npt.NDArray[np.int32]


class Decoder:
    """Sequences of `context` tokens that grow at every step, up to `steps` times.

    A step computes the next token of each given text, and the guesses that `speculate` makes.
    """

    def __init__(
        self,
        model: LFM2,
        sequences: int,
        context: int,
        steps: int,
        seed: int,
        speculate: str = NONE,
    ) -> None:
        self._model = model
        rng, vocab_size = np.random.default_rng(seed), model.spec.embed_tokens.vocab_size
        most = context + steps * most_rows(speculate)
        self._texts = [
            GivenText(speculate, context, most, vocab_size, rng) for _ in range(sequences)
        ]
        room = Room.of_sequences(sequences, most)
        self._pages = np.arange(room.pages, dtype=np.int32).reshape(sequences, -1)
        self._state = model.new_state(room)
        for tokens in chunks(sequences, context):
            starts = self._lengths()
            batch = self._batch([text.read(tokens) for text in self._texts], starts)
            model.logits(batch, self._state)

    @property
    def tokens(self) -> int:
        """Return how many tokens all sequences have together."""
        return sum(self._lengths())

    def next_batch(self) -> Batch:
        """Return the batch of a step, which wants the logits of all its rows."""
        batch = self._batch([text.next() for text in self._texts], self._lengths())
        if batch.tokens == len(batch.logits_rows):  # no guesses
            return batch
        return replace(batch, logits_rows=np.arange(batch.tokens, dtype=np.int32))

    def step(self) -> npt.NDArray[np.float32]:
        """Return the logits after each row of a step."""
        logits = self._model.logits(self.next_batch(), self._state)
        for text in self._texts:
            text.advance()
        return logits

    def _lengths(self) -> list[int]:
        return [text.length for text in self._texts]

    def _batch(self, chunks: list[Int32], starts: list[int]) -> Batch:
        return Batch.of_sequences(chunks, starts=starts, pages=self._pages)


def chunks(sequences: int, context: int) -> Iterator[int]:
    """Yield how many tokens of each sequence the forwards compute one after the other."""
    most = max(1, PROMPT_TOKENS // sequences)
    for start in range(0, context, most):
        yield min(most, context - start)


def most_tokens(sequences: Sequence[int], contexts: Sequence[int], guesses: Sequence[str]) -> int:
    """Return the tokens of the largest forward of decoders with these sizes and guesses."""
    of_contexts = max(n * max(chunks(n, context)) for n in sequences for context in contexts)
    return max(of_contexts, max(sequences) * max(map(most_rows, guesses)))
