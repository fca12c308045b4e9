"""How a check says that a backend fails, or that it cannot be judged."""

from __future__ import annotations


class CheckFailed(AssertionError):  # noqa: N818 (a verdict, not an error)
    """The backend breaks its contract; the message says where, what came and what was expected."""


class Skipped(Exception):  # noqa: N818 (a verdict, not an error)
    """The backend builds none of the blocks that the check is about; the message is its reason."""
