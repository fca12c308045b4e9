"""What an engine asks of a constraint on texts, such as a grammar (decision 0039).

The engine does not know how constraints are written; `lfm2kit.chat.guided` makes some.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt


class Allowed(NamedTuple):
    """What may come next in a text."""

    ids: npt.NDArray[np.uint32]  # bit i of word i // 32 says whether id i may; ids beyond may not
    may_end: bool  # then stop ids may come as well; if no id may, the text ends


class ConstrainedText(Protocol):
    """One text that obeys a constraint.

    Its calls come one after the other, from other threads than the engine's.  What they raise ends
    the sequence; an `Lfm2kitError` says why.
    """

    def take(self, token_id: int) -> None:
        """Add a token to the text, which the last call of `allowed` may not have been made for."""
        ...

    def allowed(self) -> Allowed:
        """Return what may come next.  The array belongs to the caller."""
        ...


@runtime_checkable
class Constraint(Protocol):
    """A constraint of a request, which each of its sequences obeys on its own."""

    def begin(self) -> ConstrainedText:
        """Return a text that has no tokens yet.  Several threads may call this at the same time.

        A sequence that was forked begins anew and takes the tokens that it has.
        """
        ...
