"""Calls in two halves, so that a join can do something else between them.

A block that works elsewhere, on the host or across a link, may have `begin(*inputs)` beside its
call.  It hands its inputs over and returns at once, and what is enqueued before `end()` is called
runs beside the block.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable


class Pending(Protocol):
    """A call that has begun."""

    def end(self) -> Any:
        """Return what the call returns.  It is asked for once."""
        ...


class Over(NamedTuple):
    """A call that was over when it began."""

    result: Any

    def end(self) -> Any:
        return self.result


@runtime_checkable
class Begins(Protocol):
    """Capability of a block: it can be begun before its result is needed.

    The core gives it to every block that lives in another memory than its surroundings.
    """

    def __call__(self, *inputs: Any) -> Any: ...

    def begin(self, *inputs: Any) -> Pending:
        """Return the call of the block with these inputs.

        The caller may drop the inputs at once, but not the call: it ends every call that it has
        begun.  As much of it as can be is done by the time that `end` is called.
        `begin(*inputs).end()` has the bits of a plain call.
        """
        ...
