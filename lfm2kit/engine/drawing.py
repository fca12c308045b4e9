"""Draws the next token of each sequence from its logits, in NumPy (decision 0035).

Logits change in this order: repetition penalty, presence and frequency penalties, bias; tokens
that a mask or `forbidden` excludes; temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from lfm2kit.engine.filters import Kept, kept
from lfm2kit.engine.logprobs import logprobs
from lfm2kit.engine.penalties import changes, penalise
from lfm2kit.engine.random_numbers import bits_of_draw
from lfm2kit.engine.sampling import LARGEST, Sampling
from lfm2kit.memory import HOST, Array, Memory
from lfm2kit.pending import Pending

Floats = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
UInt32 = npt.NDArray[np.uint32]
UInt64 = npt.NDArray[np.uint64]

WHOLE = 2.0**40  # the weight of the best token; 2**24 such weights fit into 64 bits


class Row(NamedTuple):
    """What a row of logits is for: a sequence, and how its next token is chosen."""

    sampling: Sampling
    seed: int  # of the sequence: the request's, or of a fork one that is derived from it
    position: int  # in its sequence, of the token that is drawn
    prompt: Int32  # ids within the vocabulary, as are all others
    generated: Int32  # ids drawn so far
    mask: UInt32 | None = None  # bit i of word i // 32 says whether id i is allowed; None: all
    forbidden: tuple[int, ...] = ()  # such as the stop ids before the least length is reached
    logprobs: int | None = None  # how many of the best to list; None: not even the drawn one's


class Drawn(NamedTuple):
    """A token that was drawn; for its logprobs see `lfm2kit.engine.logprobs`."""

    token_id: int
    logprob: float | None = None
    best: Sequence[tuple[int, float]] = ()  # (id, logprob), the best first


@dataclass(frozen=True, slots=True)
class NotANumber:
    """No token can be drawn at this position of a sequence, and its request must end."""

    position: int
    why: str

    def __str__(self) -> str:
        return f"no token can be drawn at position {self.position}: {self.why}"


NOT_FINITE = "the model's logits hold NaN or infinity"
ALL_EXCLUDED = "no token that is allowed there has a probability above 0"


class Sampler(Protocol):
    """Draws the next tokens of several sequences at once."""

    def draw(self, logits: Array, rows: Sequence[Row | None]) -> list[Drawn | NotANumber | None]:
        """Return what is drawn of each row of `logits`, float32 [rows, vocab_size].

        Nothing is drawn of a row that is None.  A row's result depends on nothing but that row.
        """
        ...


class Drawing(Pending, Protocol):
    """Tokens that are being drawn; `end` returns what `draw` returns."""

    @property
    def token_ids(self) -> Array:
        """Return the ids, int32 [rows], in the memory of the logits.

        They are ready for what is enqueued there after `begin`.  Where no token can be drawn, there
        is any id of the vocabulary; of a row that is None, anything.
        """
        ...


@runtime_checkable
class DrawsAhead(Protocol):
    """Capability of a sampler: it draws while the host goes on, and its tokens stay where they are.

    An engine then begins the next step before it knows the tokens of this one.
    """

    def draw(self, logits: Array, rows: Sequence[Row | None]) -> list[Drawn | NotANumber | None]:
        """Return what is drawn, as every sampler does."""
        ...

    def begin(
        self, logits: Array, rows: Sequence[Row | None], newest: Array | None = None
    ) -> Drawing:
        """Begin to draw from `logits`, and wait for nothing.

        `newest` are the `token_ids` of another drawing, of as many rows.  The last of a row's
        `generated` then only stands for its id among them.  The caller may drop all arguments.
        """
        ...


class NumPySampler:
    """The sampler for logits in any memory, and the one that others must agree with."""

    def __init__(self, memory: Memory = HOST) -> None:
        self._memory = memory

    def draw(self, logits: Array, rows: Sequence[Row | None]) -> list[Drawn | NotANumber | None]:
        pairs = zip(self._memory.to_host(logits), rows, strict=True)
        return [None if row is None else _draw(own, row) for own, row in pairs]


def _draw(logits: Floats, row: Row) -> Drawn | NotANumber:
    if not logits.max() <= LARGEST:  # nor if it is NaN
        return NotANumber(row.position, NOT_FINITE)
    changed = _changed(logits, row)
    if changed.max() < -LARGEST:
        return NotANumber(row.position, ALL_EXCLUDED)
    if row.sampling.is_greedy:
        token_id = int(changed.argmax())
    else:
        token_id = _drawn(kept(changed, row.sampling), bits_of_draw(row.seed, row.position))
    if row.logprobs is None:
        return Drawn(token_id)
    return Drawn(token_id, *logprobs(logits, token_id, row.logprobs))


def _changed(logits: Floats, row: Row) -> Floats:
    """Return the logits with all that the request asks for, as a copy if this changes any."""
    if not changes(row.sampling) and row.mask is None and not row.forbidden:
        return logits
    logits = logits.copy()
    with np.errstate(over="ignore"):  # what lies beyond LARGEST counts as infinite in any case
        penalise(logits, row.sampling, row.prompt, row.generated)
    if row.mask is not None:
        _exclude(logits, row.mask)
    logits[list(row.forbidden)] = -np.inf
    return logits


def _exclude(logits: Floats, mask: UInt32) -> None:
    """Set what the mask does not allow to -inf, and also what lies beyond its last word."""
    bits = np.unpackbits(mask.astype("<u4").view(np.uint8), bitorder="little")[: len(logits)]
    logits[: len(bits)][bits == 0] = -np.inf
    logits[len(bits) :] = -np.inf


def whole_weights(there: Kept) -> UInt64:
    """Return the weights of tokens as whole numbers, of which the best token's is 2**40.

    Sums of whole numbers do not depend on their order, so a sampler may add them up in any.
    """
    weights: UInt64 = np.rint(there.weights() * WHOLE).astype(np.uint64)
    return weights


def _drawn(there: Kept, bits: int) -> int:
    """Return the id at which the cumulative weight, in the order of ids, passes a random one."""
    if len(there.ids) == 1:
        return int(there.ids[0])
    ends = np.cumsum(whole_weights(there))
    passed = np.uint64(bits * int(ends[-1]) >> 64)
    return int(there.ids[np.searchsorted(ends, passed, side="right")])
