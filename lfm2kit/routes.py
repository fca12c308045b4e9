"""Where a rank's tokens go in an MoE layer, and where their products come back: arithmetic alone.

The experts of each rank may be divided into pieces.  A rank gets the rows of its first piece before
those that only later pieces need, so that it can compute one piece while the others' rows travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lfm2kit.transport import Traffic, held_by

Int32 = npt.NDArray[np.int32]
Places = npt.NDArray[np.intp]


class Routes(NamedTuple):
    """The routes of one rank's tokens in one layer.

    Rows are sent in the order of pieces, then ranks, then tokens.  Products come back in the order
    of pieces and ranks, and from one rank in the order in which the tokens were sent, then of k.
    """

    ranks: Places  # that each row is sent to, [rows]
    tokens: Places  # of each row, [rows]
    rows: list[list[int]]  # how many are sent, [pieces][ranks]; none to the rank itself
    pairs: list[list[int]]  # products that come back, [pieces][ranks]; also of its own experts
    places: Places  # of each (token, expert) pair among the products, [tokens, k]; the last if -1


class Division(NamedTuple):
    """The pieces of a layer's experts, as `rank` sees them.

    Arrays have an element for each expert, and a last one for the id -1, [num_experts + 1].
    """

    rank: int
    size: int  # ranks
    pieces: int
    owners: Places  # the rank that computes the expert for this one's tokens; `size` if nobody does
    there: Places  # the piece of that rank which has the expert
    own: Places  # the piece of this rank that has it; `pieces` for experts of other ranks

    def routes(self, expert_ids: Int32) -> Routes:
        """Return the routes of tokens with these experts, int32 [tokens, k]."""
        owners, pieces = self.owners[expert_ids], self.there[expert_ids]
        first = self._first_pieces(owners, pieces)
        is_sent = first[: self.size] == np.arange(self.pieces)[:, None, None]
        is_sent[:, self.rank] = False
        _, ranks, tokens = np.nonzero(is_sent)
        places, pairs = self._home(owners, pieces, first)
        return Routes(ranks, tokens, is_sent.sum(axis=2).tolist(), pairs, places)

    def _first_pieces(self, owners: Places, pieces: Places) -> Places:
        """Return the first piece of each rank that needs each token, [ranks + 1, tokens].

        It is `pieces` where none does, and 0 at the rank itself, where all tokens are.
        """
        first = np.full((self.size + 1, len(owners)), self.pieces, np.intp)
        np.minimum.at(first, (owners.T, np.arange(len(owners))), pieces.T)
        first[self.rank] = 0
        return first

    def _home(
        self, owners: Places, pieces: Places, first: Places
    ) -> tuple[Places, list[list[int]]]:
        """Return where each pair's product is among those that come back, and their numbers."""
        size, is_somebodys = self.size, owners < self.size
        by = pieces * size + owners
        numbers = np.bincount(by[is_somebodys], minlength=self.pieces * size)
        sent_with = first[owners, np.arange(len(owners))[:, None]]
        keys = np.where(is_somebodys, by * self.pieces + sent_with, self.pieces**2 * size)
        pairs = np.argsort(keys, axis=None, kind="stable")[: numbers.sum()]
        places = np.full(owners.shape, len(pairs), np.intp)
        places.reshape(-1)[pairs] = np.arange(len(pairs))
        return places, numbers.reshape(self.pieces, size).tolist()


def undivided(traffic: Traffic, rank: int) -> Division:
    """Return the experts of each rank in one piece, as `rank` sees them."""
    chosen = np.zeros((len(traffic.owners), len(traffic.owners[0])), np.int32)
    return divided(traffic, rank, chosen, 1)


def divided(traffic: Traffic, rank: int, chosen: Int32, pieces: int) -> Division:
    """Return the experts of each rank in pieces of about equally many rows, as `rank` sees them.

    `chosen` says how often the tokens of each rank chose each expert, [ranks, num_experts].  All
    ranks give the same, and so divide the experts in the same way.
    """
    owners = np.array(traffic.owners)  # [ranks, num_experts]
    size, experts = owners.shape
    numbers = np.full((size, experts + 1), pieces)
    for one in range(size):
        held = list(held_by(one, traffic.owners))
        rows = np.where(owners == one, chosen, 0).sum(axis=0)[held].tolist()
        numbers[one, held] = _even(rows, pieces)
    mine = np.append(owners[rank], size)
    there = np.append(numbers[owners[rank], np.arange(experts)], pieces)
    return Division(rank, size, pieces, mine, there, numbers[rank])


def _even(rows: Sequence[int], pieces: int) -> list[int]:
    """Return the piece of each expert: those with most rows first, each goes to the emptiest."""
    filled, numbers = [0] * pieces, [0] * len(rows)
    for expert in sorted(range(len(rows)), key=lambda expert: -rows[expert]):
        numbers[expert] = filled.index(min(filled))
        filled[numbers[expert]] += rows[expert]
    return numbers
