"""The order in which the connections of ranks ended, even if they are looked at much later.

A rank that ends takes others with it within milliseconds, and a hub without a core sees all these
ends at once.  Linux reports what has happened to connections in the order in which it did.
"""

from __future__ import annotations

import select
import socket


class Ends:
    """Connections to ranks, and which of them have ended, the first one first."""

    def __init__(self) -> None:
        self.order: list[int] = []  # ranks
        self._ranks: dict[int, int] = {}  # by the descriptor of their connection
        self._poll = select.epoll() if hasattr(select, "epoll") else None

    def watch(self, rank: int, link: socket.socket) -> None:
        """Note the end of `link` from now on, and of nothing else that happens to it."""
        self._ranks[link.fileno()] = rank
        if self._poll is not None:
            self._poll.register(link, select.EPOLLRDHUP | select.EPOLLET)

    def leave(self, rank: int) -> None:
        """Take in that all has been read from `rank`; what ended before it comes before it."""
        self._look()
        self._append(rank)

    def before(self, rank: int) -> list[int]:
        """Return the ranks whose connections have ended, and if that of `rank` has, before it."""
        self._look()
        return self.order[: self.order.index(rank)] if rank in self.order else self.order

    def _look(self) -> None:
        events = self._poll.poll(0) if self._poll is not None else []
        for descriptor, _ in events:
            self._append(self._ranks[descriptor])

    def _append(self, rank: int) -> None:
        if rank not in self.order:
            self.order.append(rank)
