"""The exchange that every transport has: NumPy over its host collectives.

It is the slow and clear twin of every other exchange: they give the same bits.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from lfm2kit.memory import HOST, Memory
from lfm2kit.transport import ExchangeOffer, Exchanges, Rows, Traffic, Transport

Floats = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]

# What stands for the product of an id of -1: added to any number, even to -0.0, it changes nothing.
NOTHING = np.float32(-0.0)


def offered(transport: Transport, outer: Memory) -> ExchangeOffer:
    """Return the transport's exchange for blocks in `outer`; the host's where it has none."""
    offer = transport.exchange_in(outer) if isinstance(transport, Exchanges) else None
    return offer or ExchangeOffer(HOST, partial(HostExchange, transport))


class HostExchange:
    """An exchange that sends each token to each of its experts as a row, and the products back."""

    def __init__(self, transport: Transport, traffic: Traffic) -> None:
        self._transport = transport
        self._owners = np.array(traffic.owners, np.intp)
        self._expert_ids: Int32 = np.empty((0, 1), np.int32)
        self._pairs = np.empty(0, np.intp)  # flat places in `_expert_ids`, in the order of sending
        self._received: list[int] = []  # rows from each rank

    def dispatch(self, x: Floats, expert_ids: Int32, expert_weights: Floats) -> Rows:
        flat = expert_ids.reshape(-1)
        self._expert_ids, self._pairs = expert_ids, self._by_owner(flat)
        experts = flat[self._pairs]
        row = np.dtype([("expert", "<i4"), ("weight", "<f4"), ("x", "<f4", x.shape[1:])])
        rows = np.empty(len(experts), row)
        rows["expert"] = experts
        rows["weight"] = expert_weights.reshape(-1)[self._pairs]
        rows["x"] = x[self._pairs // expert_ids.shape[1]]
        received, self._received = self._transport.all_to_all(rows, self._counts(experts))
        return Rows(
            _column(received, "x"),
            _column(received, "expert")[:, None],
            _column(received, "weight")[:, None],
        )

    def combine(self, products: Floats) -> Floats:
        returned, _ = self._transport.all_to_all(np.ascontiguousarray(products), self._received)
        of_pairs = np.full((self._expert_ids.size, products.shape[1]), NOTHING)
        of_pairs[self._pairs] = returned
        by_k = of_pairs.reshape(*self._expert_ids.shape, products.shape[1])
        delta: Floats = by_k[:, 0].copy()
        for k in range(1, by_k.shape[1]):
            delta += by_k[:, k]
        delta[(self._expert_ids < 0).all(axis=1)] = 0
        return delta

    def _by_owner(self, flat: Int32) -> npt.NDArray[np.intp]:
        """Return the places of the ids that are not -1, by the rank that holds the expert."""
        taken = np.flatnonzero(flat >= 0)
        return taken[np.argsort(self._owners[flat[taken]], kind="stable")]

    def _counts(self, experts: Int32) -> list[int]:
        size = self._transport.world.size
        return [int(n) for n in np.bincount(self._owners[experts], minlength=size)]


def _column(rows: npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
    return np.ascontiguousarray(rows[name])
