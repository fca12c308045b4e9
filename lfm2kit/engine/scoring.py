"""Says how probable a model finds the tokens of a prompt, each after those before it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lfm2kit.engine.logprobs import logprobs
from lfm2kit.engine.sampling import LARGEST
from lfm2kit.errors import Lfm2kitError

Floats = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]


class Scored(NamedTuple):
    """A token and its logprob, and the best ones at its position."""

    position: int  # in a prompt, whose first token is at 0 and has no logprob; or in an answer
    token_id: int
    logprob: float
    best: tuple[tuple[int, float], ...]  # (token id, logprob), best first


def scored(ids: Int32, after: range, logits: Floats, most: int) -> tuple[Scored, ...]:
    """Return the tokens of a prompt that come right after these positions.

    `logits`, float32 [len(after), vocab_size], are those of the positions.  Raise `Lfm2kitError`,
    which names the position, if a row has NaN or infinity, or no finite number.
    """
    return tuple(
        _scored(ids, before + 1, row, most) for before, row in zip(after, logits, strict=True)
    )


def _scored(ids: Int32, position: int, logits: Floats, most: int) -> Scored:
    if not -LARGEST <= logits.max() <= LARGEST:  # nor if it is NaN
        raise Lfm2kitError(
            f"the prompt's token at position {position} has no logprob: the model's logits there "
            "hold NaN or infinity"
        )
    token_id = int(ids[position])
    logprob, best = logprobs(logits, token_id, most)
    return Scored(position, token_id, logprob, tuple(best))
