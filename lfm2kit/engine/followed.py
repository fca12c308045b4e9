"""One sequence under its constraint: what may come next, after the tokens that it has.

A text that begins takes all tokens that were drawn so far.  So forks need nothing of their own, and
sequences that were put back, or whose step was interrupted, go on with what they have.
"""

from __future__ import annotations

from collections.abc import Iterable
from reprlib import repr as brief  # of what a constraint gives, however long it is
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lfm2kit.engine.constraints import ConstrainedText
from lfm2kit.engine.requests import FAILED, STOP, Request
from lfm2kit.errors import Lfm2kitError
from lfm2kit.plugin_faults import blaming, name_of

Int32 = npt.NDArray[np.int32]
UInt32 = npt.NDArray[np.uint32]


class Next(NamedTuple):
    """What may come next in a sequence: tokens, or its end."""

    mask: UInt32 | None = None  # [ceil(vocab_size / 32)], as a sampler takes it; None: all tokens
    end: str | None = None  # STOP or FAILED: no token
    error: Exception | None = None  # why it failed


class Followed:
    """The text of a sequence, and how many of its tokens the text has taken."""

    def __init__(self, request: Request, vocab_size: int) -> None:
        self._request = request
        self._name = name_of(type(request.constraint))
        self._vocab_size = vocab_size
        self._text: ConstrainedText | None = None
        self._taken = 0

    def next(self, generated: Int32) -> Next:
        """Return what may come after these tokens; those of the last call begin them."""
        try:
            with blaming(self._name):
                return self._next(generated)
        except Exception as error:
            return Next(end=FAILED, error=error)
        except BaseException as error:  # such as a library's panic
            name = type(error).__name__
            return Next(end=FAILED, error=Lfm2kitError(f"the constraint failed: {name}: {error}"))

    def _next(self, generated: Int32) -> Next:
        if self._text is None:
            assert self._request.constraint is not None
            self._text = self._request.constraint.begin()
        for token_id in generated[self._taken :].tolist():
            self._text.take(token_id)
            self._taken += 1
        ids, may_end = self._text.allowed()
        if not isinstance(ids, np.ndarray) or ids.dtype != np.uint32 or ids.ndim != 1:
            raise Lfm2kitError(f"{self._name} allows {brief(ids)}; expected words, uint32 [n]")
        mask = self._of_vocabulary(ids)
        if mask.any():
            return Next(_with(mask, self._request.stop_ids) if may_end else mask)
        if may_end:
            return Next(end=STOP)
        raise Lfm2kitError(
            f"the constraint allows neither a token nor the end after {self._taken} tokens"
        )

    def _of_vocabulary(self, ids: UInt32) -> UInt32:
        """Return the words for the model's vocabulary, without any bit beyond it."""
        mask = np.zeros(-(-self._vocab_size // 32), np.uint32)
        mask[: len(ids)] = ids[: len(mask)]
        if beyond := len(mask) * 32 - self._vocab_size:
            mask[-1] &= np.uint32(2 ** (32 - beyond) - 1)
        return mask


def _with(mask: UInt32, token_ids: Iterable[int]) -> UInt32:
    """Return the mask, in which these ids are now allowed."""
    for token_id in token_ids:
        mask[token_id // 32] |= np.uint32(1 << token_id % 32)
    return mask
