"""What models say of a text: each token's logprob, and how far two distributions are apart.

Everything is computed in float64 from the models' logits, and kept for each token, so that no sum
depends on how many windows are computed together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from lfm2kit.errors import Lfm2kitError
from lfm2kit.model import LFM2
from lfm2kit_perplexity.windows import Int32, Window, batch_of

Float64 = npt.NDArray[np.float64]

MOST_LOGITS = 2**25  # of windows that are computed together; one alone may have more
ROWS = 16  # of logits that are float64 at once


@dataclass(frozen=True)
class Scores:
    """A number for each token of a text but the first."""

    logprobs: Float64  # of the token, by the model
    base_logprobs: Float64  # by the other model; NaN without one
    divergences: Float64  # KL(other model || model), in nats; NaN without one
    agreements: Float64  # 1 where the most probable token is the same, else 0; NaN without one


def windows_at_once(some: Sequence[Window], vocab_size: int) -> int:
    """Return how many windows may be computed together: at least one, whatever its logits take."""
    rows = max(one.end - one.first for one in some)
    return max(1, MOST_LOGITS // (rows * vocab_size))


def logits_bytes(rows: int, vocab_size: int) -> int:
    """Return the bytes of a model's logits, in float32."""
    return 4 * rows * vocab_size


def score(
    models: Sequence[LFM2],
    ids: Int32,
    some: Sequence[Window],
    at_once: int,
    done: Callable[[int], None] = lambda tokens: None,
) -> Scores:
    """Return what a model says of a text, and how another one, if it is given, differs.

    Raise `Lfm2kitError`, which names the token, for logits that are not finite.
    """
    columns = np.full((4, len(ids) - 1), np.nan)
    left = iter(some)
    while group := list(islice(left, at_once)):
        targets = np.concatenate([np.arange(one.first, one.end) for one in group])
        batch = batch_of(ids, group)
        logits = [model.logits(batch) for model in models]
        for rows in _blocks(len(targets)):
            at = targets[rows]
            values = [_log_softmax(each[rows], at) for each in logits]
            columns[:, at - 1] = np.stack(list(_compared(ids[at], *values)))
        done(len(targets))
    return Scores(*columns)


def _compared(ids: Int32, values: Float64, base: Float64 | None = None) -> Iterator[Any]:
    """Yield the four numbers of some tokens, from logprobs [tokens, vocab_size]."""
    places = np.arange(len(ids)), ids
    yield values[places]
    if base is None:
        yield from np.full((3, len(ids)), np.nan)
        return
    yield base[places]
    yield (np.exp(base) * (base - values)).sum(axis=1)
    yield base.argmax(axis=1) == values.argmax(axis=1)


def _blocks(rows: int) -> Iterator[slice]:
    return (slice(begin, begin + ROWS) for begin in range(0, rows, ROWS))


def _log_softmax(logits: npt.NDArray[np.float32], tokens: npt.NDArray[np.intp]) -> Float64:
    """Return the logprobs of every token, [rows, vocab_size]; `tokens` are places for errors."""
    is_finite = np.isfinite(logits).all(axis=1)
    if not is_finite.all():
        place = int(tokens[np.argmin(is_finite)])
        raise Lfm2kitError(f"token {place} of the text: the model's logits hold NaN or infinity")
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    values: Float64 = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return values
