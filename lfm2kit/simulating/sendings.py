"""Calculates what ranks send each other from the experts that their tokens choose.

Nothing here looks at what an exchange has counted.  Both use `Sent.add` and the form of a message.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lfm2kit.exchange_round import WORD, Message
from lfm2kit.transport import ExchangeCounts, Sent, Traffic

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


class Sendings(NamedTuple):
    """The rows that the ranks of a job send each other in one layer of a forward."""

    traffic: Traffic  # among all ranks, whose groups have owners of their own
    peers: Sequence[int]  # how many ranks each one shares experts with, [ranks]
    tokens: Int64  # that each rank sends to each other one, [from, to]; none to itself
    pairs: Int64  # (token, expert) pairs, [token's rank, expert's rank]
    expert_rows: Int64  # of each rank's experts, [ranks, experts]

    @classmethod
    def of(cls, expert_ids: Sequence[Int32], traffic: Traffic, peers: Sequence[int]) -> Sendings:
        """Return the rows for tokens of each rank that chose `expert_ids`, [ranks][tokens, k].

        An id of -1 stands for no expert.
        """
        size, experts = len(traffic.owners), len(traffic.owners[0])
        ids = np.concatenate(expert_ids)
        sources = np.repeat(np.arange(size), [len(of_rank) for of_rank in expert_ids])[:, None]
        owners = np.array([[*of_rank, size] for of_rank in traffic.owners])  # of -1: nobody
        targets = np.sort(owners[sources, ids], axis=1)
        is_first = np.diff(targets, axis=1, prepend=-1) > 0  # a token goes to a rank once
        is_sent = is_first & (targets != sources) & (targets < size)
        between = sources * size + targets
        held = owners[sources, ids] * experts + ids
        return cls(
            traffic,
            peers,
            _counted(between[is_sent], size, size),
            _counted(between[targets < size], size, size),
            _counted(held[ids >= 0], size, experts),
        )

    def counts(self) -> list[ExchangeCounts]:
        """Return what each rank's exchange counts, in order of rank, with 0 seconds."""
        return [self._of_rank(rank) for rank in range(len(self.traffic.owners))]

    def bytes(self) -> tuple[Int64, Int64]:
        """Return the bytes that are dispatched and combined, both [from, to]."""
        dispatched, back = self._row_bytes()
        return self.tokens * dispatched, _to_others(self.pairs.T) * back

    def copied_rows(self) -> Int64:
        """Return the rows that each rank copies or adds, [ranks]."""
        rows: Int64 = self.tokens.sum(axis=1) + self.pairs.sum(axis=0) + self.pairs.sum(axis=1)
        return rows

    def copied_bytes(self) -> Int64:
        """Return the bytes of the rows that each rank copies or adds, [ranks]."""
        hidden_size, row_format = self.traffic.hidden_size, self.traffic.row_format
        rows = self.tokens.sum(axis=1) + self.pairs.sum(axis=0)
        products = self.pairs.sum(axis=1)
        copied: Int64 = rows * row_format.nbytes((hidden_size,)) + products * WORD * hidden_size
        return copied

    def _of_rank(self, rank: int) -> ExchangeCounts:
        dispatched, back = self._row_bytes()
        headers = Message.header_bytes(self.traffic.num_experts_per_tok)
        counts, dispatch, combine = Sent(), Sent(), Sent()
        counts.add([1] * self.peers[rank], WORD, WORD)
        dispatch.add(self.tokens[rank].tolist(), dispatched, headers)
        combine.add(_to_others(self.pairs.T)[rank].tolist(), back)
        copied = int(self.copied_rows()[rank])
        return ExchangeCounts(counts, dispatch, combine, copied, self.expert_rows[rank])

    def _row_bytes(self) -> tuple[int, int]:
        """Return the bytes of a row that is dispatched, and of one that comes back."""
        hidden_size, k, _, row_format = self.traffic
        return Message.nbytes(hidden_size, k, row_format), WORD * hidden_size


def gathered(samples: Sequence[int], vocab_size: int) -> list[Sent]:
    """Return what each rank sends when rank 0 gathers a forward's logits, of [ranks] samples."""
    everyones = [Sent() for _ in samples]
    for sent, count in list(zip(everyones, samples, strict=True))[1:]:
        sent.add([count], WORD * vocab_size)
    return everyones


def _counted(numbers: npt.NDArray[Any], rows: int, columns: int) -> Int64:
    counts: Int64 = np.bincount(numbers, minlength=rows * columns).astype(np.int64)
    return counts.reshape(rows, columns)


def _to_others(between: Int64) -> Int64:
    """Return the same numbers, [from, to], without those of a rank to itself."""
    away: Int64 = between * (1 - np.eye(len(between), dtype=np.int64))
    return away
