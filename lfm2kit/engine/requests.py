"""What is asked of an engine, and what it answers: requests and events."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from reprlib import repr as brief  # of what a caller gives, however long it is
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lfm2kit.batch_rules import integers
from lfm2kit.engine.constraints import Constraint
from lfm2kit.engine.guesses import Guesses
from lfm2kit.engine.sampling import MOST_LOGPROBS, Sampling
from lfm2kit.engine.scoring import Scored
from lfm2kit.errors import Lfm2kitError

# Why a sequence ended.
STOP, LENGTH, CANCELLED, FAILED = "stop", "length", "cancelled", "failed"

MOST_CHOICES = 128  # of one request


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A prompt, and how `n` sequences are to go on from it.

    Raise `Lfm2kitError` for a value out of range, and name it.
    """

    prompt: npt.ArrayLike  # token ids, one or more
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None  # of each sequence; None: as many as the context leaves
    usual_tokens: int | None = None  # without `max_tokens`, if the context leaves as many
    min_tokens: int = 0  # before which no stop id is drawn
    stop_ids: Iterable[int] = ()
    n: int = 1  # the seeds of all but the first are derived from the first one's
    logprobs: int | None = None  # how many of the best are returned; None: not the chosen one's
    prompt_logprobs: int | None = None  # the same of the prompt's tokens, with the first choice
    constraint: Constraint | None = None  # that each sequence obeys, such as a grammar
    guesses: Callable[[], Guesses] | None = None  # makes who guesses the tokens of a sequence

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", _ids("prompt", self.prompt))
        stop_ids: Any = [*self.stop_ids] if np.iterable(self.stop_ids) else self.stop_ids
        object.__setattr__(self, "stop_ids", tuple(_ids("stop_ids", stop_ids).tolist()))
        if not len(self.ids):
            raise Lfm2kitError("the prompt is empty; give one token or more")
        if self.max_tokens is not None:
            check_whole("max_tokens", self.max_tokens, 1)
        if self.usual_tokens is not None:
            check_whole("usual_tokens", self.usual_tokens, 1)
        check_whole("min_tokens", self.min_tokens, 0, self.max_tokens)
        check_whole("n", self.n, 1, MOST_CHOICES)
        for name in ("logprobs", "prompt_logprobs"):
            if (most := getattr(self, name)) is not None:
                check_whole(name, most, 0, MOST_LOGPROBS)
        if not isinstance(self.sampling, Sampling):
            raise Lfm2kitError(f"sampling is {brief(self.sampling)}; expected a Sampling")
        if not isinstance(self.constraint, Constraint | None):
            raise Lfm2kitError(
                f"constraint is {brief(self.constraint)}; expected an object with a method begin, "
                "such as those that lfm2kit.chat.guided makes"
            )
        if self.guesses is not None and not callable(self.guesses):
            raise Lfm2kitError(
                f"guesses is {brief(self.guesses)}; expected what makes an object with a method "
                "guess, such as lfm2kit.engine.guesses.RepeatedText"
            )

    @property
    def ids(self) -> npt.NDArray[np.int32]:
        """Return the prompt's ids, int32 [tokens]."""
        ids: Any = self.prompt  # an array since `__post_init__`
        return ids  # type: ignore[no-any-return]


class Event(NamedTuple):
    """What there is to tell of a sequence: its next token, its end, or tokens of its prompt."""

    id: int  # of the request
    choice: int  # which of its n sequences, from 0
    token_id: int | None  # None: no other token has come
    logprob: float | None = None
    best: tuple[tuple[int, float], ...] = ()  # (token id, logprob), best first
    end: str | None = None  # STOP, LENGTH, CANCELLED or FAILED; None: the sequence goes on
    error: Exception | None = None  # why it failed
    prompt: tuple[
        Scored, ...
    ] = ()  # the next tokens of the prompt, if logprobs of it are asked for


def _ids(name: str, values: npt.ArrayLike) -> npt.NDArray[np.int32]:
    """Return a copy of `values` as int32 [tokens]; `Lfm2kitError` if they are not token ids."""
    try:
        ids = np.array(integers(name, values))
    except ValueError as error:
        raise Lfm2kitError(str(error)) from None
    if ids.ndim != 1:
        raise Lfm2kitError(f"{name} has shape {ids.shape}, but must be one row of token ids")
    return ids


def check_whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Raise `Lfm2kitError` if `value` is not a whole number from `least` to `most`."""
    is_whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_whole or value < least or (most is not None and value > most):
        to = "or more" if most is None else f"to {most}"
        raise Lfm2kitError(f"{name} is {brief(value)}; expected a whole number, {least} {to}")
