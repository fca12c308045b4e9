"""The exchange: an all-gather of rows with their ids, and a swap of products.

It is written over an array module, CuPy or in tests NumPy, and a communicator with two operations.
All shapes are those of the rank with most tokens in a forward: every rank gets every rank's rows,
once for each expert of a token, and the ids of those that are not for it become -1.  For experts
that read 16 bits, a token's rank rounds its row before it is sent.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np

from lfm2kit.formats import BF16, F32, Format
from lfm2kit.memory import Adds, Array, Memory
from lfm2kit.transport import ExchangeOffer, Rows, Traffic, Transport, everyones

# "1": forwards are captured.  NCCL allows that where all ranks capture the same calls together, so
# their batches must have the same forms at the same time.
CAPTURED = "LFM2KIT_NCCL_CAPTURED"
NOTHING = np.float32(-0.0)  # added to any number, it changes nothing
LARGEST_HALF = np.float32(65504)


class Communicator(Protocol):
    """What ranks send each other through, all of the same shapes, in the current stream."""

    @property
    def arrays(self) -> Any:
        """Return the module of the arrays: CuPy, or NumPy."""
        ...

    def all_gather(self, array: Array) -> Array:
        """Return every rank's array, [ranks, *array.shape]."""
        ...

    def swap(self, blocks: Array) -> Array:
        """Send block r of [ranks, ...] to rank r, and return the blocks that came, by rank."""
        ...


# Makes the communicator; collective.  The sentence says why this rank has none.
Connect = Callable[[Transport, Memory], "tuple[Communicator | None, str | None]"]


class Meeting:
    """The ranks of a transport that exchange tokens in a memory."""

    def __init__(self, transport: Transport, memory: Memory, connect: Connect) -> None:
        self.world = transport.world
        self.memory = memory
        self.slots = 0  # tokens of each rank that a forward has room for
        self._transport = transport
        self._connect = connect
        self._communicator: Communicator | None = None

    @property
    def communicator(self) -> Communicator:
        assert self._communicator is not None, "the exchange is tried out before it is used"
        return self._communicator

    def offer(self) -> ExchangeOffer:
        is_captured = os.environ.get(CAPTURED) == "1"
        return ExchangeOffer(
            self.memory, self.create, is_captured, why_not=self.why_not, around=self.around
        )

    def create(self, traffic: Traffic) -> GatheringExchange:
        return GatheringExchange(self, traffic)

    def why_not(self) -> str | None:
        """Connect the ranks; return why this one cannot.  Every rank calls this."""
        if self._communicator is not None:
            return None
        self._communicator, reason = self._connect(self._transport, self.memory)
        return reason

    @contextmanager
    def around(self, tokens: int) -> Iterator[Hashable]:
        """Settle how many tokens the largest rank has; every rank enters this for each forward."""
        self.slots = max(1, int(everyones(self._transport, tokens).max()))
        yield self.slots


class _Home(NamedTuple):
    """The tokens that are under way."""

    ids: Array  # [tokens, k]
    owners: Array  # of each id, [tokens, k]; -1 of nobody


class GatheringExchange:
    """The exchange of one layer."""

    def __init__(self, meeting: Meeting, traffic: Traffic) -> None:
        self._meeting = meeting
        self._traffic = traffic
        table = np.array([[*owners, -1] for owners in traffic.owners], np.int32)
        self._experts = table.shape[1] - 1
        self._owners = meeting.memory.from_host(table.reshape(-1))  # [ranks * (experts + 1)]
        self._home: _Home | None = None

    def dispatch(self, x: Array, expert_ids: Array, expert_weights: Array) -> Rows:
        meeting = self._meeting
        ranks, rank, slots = meeting.world.size, meeting.world.rank, meeting.slots
        if len(x) > slots:
            raise ValueError(f"{len(x)} tokens, but the ranks have settled on {slots}")
        xp, gather = meeting.communicator.arrays, meeting.communicator.all_gather
        self._home = _Home(expert_ids, self._owners_of(expert_ids, rank))
        rows = gather(_filled_up(xp, _rounded(xp, x, self._traffic.row_format), slots, 0))
        ids = gather(_filled_up(xp, expert_ids, slots, -1))
        weights = gather(_filled_up(xp, expert_weights, slots, 0))
        sources = xp.arange(ranks, dtype=np.int32)[:, None, None]
        ids = xp.where(self._owners_of(ids, sources) == rank, ids, np.int32(-1))
        k = ids.shape[2]
        repeated = xp.repeat(rows.reshape(ranks * slots, x.shape[1]), k, axis=0)
        return Rows(repeated, ids.reshape(-1, 1), weights.reshape(-1, 1))

    def combine(self, products: Array) -> Array:
        assert self._home is not None, "`dispatch` comes first"
        (ids, owners), self._home = self._home, None
        meeting, (tokens, k), width = self._meeting, ids.shape, self._traffic.hidden_size
        xp, slots = meeting.communicator.arrays, meeting.slots
        came = meeting.communicator.swap(products.reshape(meeting.world.size, slots * k, width))
        pairs = xp.arange(tokens * k, dtype=np.int32).reshape(tokens, k)
        places = xp.maximum(owners, 0) * np.int32(slots * k) + pairs
        terms = came.reshape(-1, width).take(places.reshape(-1), axis=0)
        terms = xp.where(ids.reshape(-1, 1) < 0, NOTHING, terms).reshape(tokens, k, width)
        delta = xp.ascontiguousarray(terms[:, 0])
        for number in range(1, k):
            delta = self._sum(delta, xp.ascontiguousarray(terms[:, number]))
        return xp.where(ids.max(axis=1)[:, None] < 0, np.float32(0), delta)

    def _sum(self, left: Array, right: Array) -> Array:
        """Return the sum by the memory's own kernel: CuPy's would flush small numbers to 0."""
        assert isinstance(self._meeting.memory, Adds)
        return self._meeting.memory.add(left, right)

    def _owners_of(self, ids: Array, source: Any) -> Array:
        """Return the rank that computes each id for a source's tokens; -1 for an id of -1."""
        xp = self._meeting.communicator.arrays
        known = xp.where(ids < 0, np.int32(self._experts), ids)
        return self._owners.take(known + np.int32(self._experts + 1) * source)


def _rounded(xp: Any, x: Array, row_format: Format) -> Array:
    """Return float32 rows in the format in which experts read them.

    These are the bits of `lfm2kit.formats.rounded`, by operations that are exact on a GPU too.
    """
    if row_format == F32:
        return x
    is_nan = xp.isnan(x)
    if row_format == BF16:
        bits = xp.ascontiguousarray(x).view(np.uint32)
        last = (bits >> np.uint32(16)) & np.uint32(1)
        nearest = (bits + np.uint32(0x7FFF) + last) >> np.uint32(16)
        quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
        return xp.where(is_nan, quiet, nearest).astype(np.uint16)
    is_finite = xp.isfinite(x)
    within = xp.where(is_finite, xp.clip(x, -LARGEST_HALF, LARGEST_HALF), x)
    halves = xp.where(is_nan, np.float32(0), within).astype(np.float16)
    return xp.where(is_nan, np.uint16(0x7FFF), halves.view(np.uint16)).view(np.float16)


def _filled_up(xp: Any, array: Array, rows: int, value: int) -> Array:
    """Return the array with rows of `value` behind it."""
    filled = xp.full((rows, *array.shape[1:]), value, array.dtype)
    filled[: len(array)] = array
    return filled
