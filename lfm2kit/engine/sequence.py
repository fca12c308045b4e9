"""A sequence that an engine makes longer: its tokens, its pages, and how much they hold."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lfm2kit.engine.drawing import Row
from lfm2kit.engine.guesses import MOST_GUESSES
from lfm2kit.engine.guessing import Guessing
from lfm2kit.engine.random_numbers import seed_of_fork
from lfm2kit.engine.requests import LENGTH, STOP, Request

Int32 = npt.NDArray[np.int32]
UInt32 = npt.NDArray[np.uint32]

UNKNOWN = (0,)  # stands for a token that was drawn, but not read: any id of the vocabulary


class Sequence:
    """A prompt and the tokens drawn so far.

    The last token is never in its pages: its row of logits is still to be computed.
    """

    def __init__(
        self, id: int, choice: int, age: int, request: Request, most: int, seed: int
    ) -> None:
        self.id = id
        self.choice = choice
        self.age = age  # smaller numbers were added before
        self.request = request
        self.most = most  # tokens, the prompt included
        self.seed = seed
        self.pages: list[int] = []
        self.computed = 0  # tokens that the pages hold
        self.followers: list[Sequence] = []  # wait until the prompt that they share is computed
        self.forks = 0
        self.scored = 0  # rows of logits by which tokens of the prompt have been scored
        is_scored = choice == 0 and request.prompt_logprobs is not None
        self._rows_to_score = len(request.ids) - 1 if is_scored else 0
        # The text of a constraint has a mask at each place, which nobody knows ahead.
        is_guessed = request.guesses is not None and request.constraint is None
        self.guessing = Guessing(request.guesses) if request.guesses and is_guessed else None
        self._ids = request.ids  # never written: a longer array, with room for more, replaces it
        self._count = len(self._ids)

    @property
    def ids(self) -> Int32:
        """Return all of its token ids."""
        return self._ids[: self._count]

    @property
    def generated(self) -> Int32:
        """Return the ids that were drawn."""
        return self._ids[len(self.request.ids) : self._count]

    @property
    def left(self) -> int:
        """Return how many tokens its pages do not hold yet."""
        return self._count - self.computed

    @property
    def ends_next(self) -> bool:
        """Return whether its next token is the last one, whatever that is."""
        return self._count + 1 >= self.most

    @property
    def shareable(self) -> int:
        """Return how many of its tokens need not be computed if others' pages hold them."""
        return self.scored if self.scored < self._rows_to_score else self._count

    def to_score(self, tokens: int) -> range:
        """Return those of its next `tokens` positions whose logits score the prompt's next token.

        Positions that were scored before it was put back are not among them.
        """
        end = min(self.computed + tokens, self._rows_to_score)
        return range(max(self.computed, self.scored), end)

    def append(self, token_id: int) -> str | None:
        """Add a token that was drawn; return why the sequence ends, if it does."""
        if self._count == len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
        self._ids[self._count] = token_id
        self._count += 1
        if token_id in self.request.stop_ids:
            return STOP
        return LENGTH if self._count >= self.most else None

    def guess(self, most: int) -> tuple[int, ...]:
        """Return up to `most` guesses of its next tokens."""
        most = min(most, MOST_GUESSES, self.most - self._count - 1)
        if self.guessing is None or most < 1:
            return ()
        return self.guessing.guess(self.ids, most)

    def told(self, guessed: int, right: int) -> None:
        """Take note of how many of its guesses were right."""
        if self.guessing is not None and guessed:
            self.guessing.told(guessed, right)

    def row(self, mask: UInt32 | None = None, guessed: tuple[int, ...] = ()) -> Row:
        """Return what a sampler needs to know to draw the next token, which obeys the mask.

        With guesses, it is the token after them.
        """
        request, generated = self.request, self.generated
        if guessed:
            generated = np.concatenate([generated, np.array(guessed, np.int32)])
        is_early = len(generated) < request.min_tokens
        return Row(
            sampling=request.sampling,
            seed=self.seed,
            position=self._count + len(guessed),
            prompt=request.ids,
            generated=generated,
            mask=mask,
            forbidden=tuple(request.stop_ids) if is_early else (),
            logprobs=request.logprobs,
        )

    def fork(self, id: int, age: int) -> Sequence:
        """Return a sequence of the same tokens, which goes on with other random numbers."""
        number = self.request.n + self.forks  # smaller ones are of the request's own sequences
        seed = seed_of_fork(self.seed, number)
        fork = Sequence(id, 0, age, self.request, self.most, seed)
        self.forks += 1
        fork._ids, fork._count = self.ids, self._count
        fork._rows_to_score = 0
        return fork
