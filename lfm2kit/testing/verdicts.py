"""How a check says that a backend fails, or that it cannot be judged."""

from __future__ import annotations


class CheckFailed(AssertionError):  # noqa: N818 (a verdict, not an error)
    """A breach of the contract; the message says where, what came and what was expected."""


class Skipped(Exception):  # noqa: N818 (a verdict, not an error)
    """A check of blocks that the backend does not build; the message is the backend's reason."""


class NotPromised(Exception):  # noqa: N818 (a verdict, not an error)
    """A check of a promise that the backend takes back; the message begins with its reason."""
