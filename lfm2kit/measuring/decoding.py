"""Decoding to be timed: one token after another, after contexts of some length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from lfm2kit.batch import Batch
from lfm2kit.model import LFM2
from lfm2kit.state import Room

PROMPT_TOKENS = 4096  # of all sequences, in a forward that computes contexts

Int32 = npt.NDArray[np.int32]


class Decoder:
    """Sequences of `context` tokens that grow by a token each at every step, up to `steps` times.

    Tokens are random: chosen by the model, they would soon go round in the same experts.
    """

    def __init__(self, model: LFM2, sequences: int, context: int, steps: int, seed: int) -> None:
        self._model = model
        self._rng = np.random.default_rng(seed)
        room = Room.of_sequences(sequences, context + steps)
        self._pages = np.arange(room.pages, dtype=np.int32).reshape(sequences, -1)
        self._state = model.new_state(room)
        self._position = 0
        for tokens in chunks(sequences, context):
            model.logits(self._next_batch(tokens), self._state)
            self._position += tokens

    def next_batch(self) -> Batch:
        """Return the batch of a step, with other tokens each time."""
        return self._next_batch(1)

    def step(self) -> npt.NDArray[np.float32]:
        """Return the logits of every sequence's next token."""
        logits = self._model.logits(self.next_batch(), self._state)
        self._position += 1
        return logits

    def _next_batch(self, tokens: int) -> Batch:
        vocab_size, sequences = self._model.spec.embed_tokens.vocab_size, len(self._pages)
        ids: Int32 = self._rng.integers(0, vocab_size, (sequences, tokens), dtype=np.int32)
        starts = [self._position] * sequences
        return Batch.of_sequences(list(ids), starts=starts, pages=self._pages)


def chunks(sequences: int, context: int) -> Iterator[int]:
    """Yield how many tokens of each sequence the forwards compute one after the other."""
    most = max(1, PROMPT_TOKENS // sequences)
    for start in range(0, context, most):
        yield min(most, context - start)


def most_tokens(sequences: Sequence[int], contexts: Sequence[int]) -> int:
    """Return the tokens of the largest forward of decoders with these sizes."""
    return max(n * max(chunks(n, context)) for n in sequences for context in contexts)
