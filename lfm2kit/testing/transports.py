"""Checks of a transport: every rank of a job calls them, and each returns or raises `CheckFailed`.

check_transport(transport)              the collective operations, in groups too
check_exchange(transport, memory)       its exchange for blocks in `memory`, or the host's
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lfm2kit.backend import TellsWaits
from lfm2kit.formats import BF16, F16, F32, rounded
from lfm2kit.host_exchange import offered
from lfm2kit.memory import HOST, Memory
from lfm2kit.testing.verdicts import CheckFailed
from lfm2kit.transport import (
    Aside,
    Counted,
    Exchange,
    FormsGroups,
    Owners,
    SharesMemory,
    Traffic,
    Transport,
    WorksAside,
    WorksInPieces,
    World,
    evenly,
    everyones,
    held_by,
    held_once,
)

Floats = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]

RECORD = [("a", "<i4"), ("b", "<f4", 5)]
ROWS: tuple[tuple[Any, tuple[int, ...]], ...] = (
    ("<f4", (7,)), ("<i4", ()), ("<f8", (2, 3)), (RECORD, ()),
)  # fmt: skip
HIDDEN_SIZE, ODD_SIZE = 6, 7

# Numbers of which rows of 16 bits show how they were rounded: ties of BF16 and F16, some of them
# below the least normal number, and numbers that F16, or BF16, cannot hold.
EDGES = np.array(
    [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 2**-25, -1.5 * 2**-24, 7e4, -65519,
     3.4e38, np.inf, -0.0, 1e-40, 2**-14 - 2**-26],
    np.float32,
)  # fmt: skip


def check_transport(transport: Transport) -> None:
    """Check that rows of any type reach the rank they are sent to, in the order of the ranks.

    If the transport `FormsGroups`, its groups are checked in the same way, if it `WorksAside`,
    calls beside the caller's work, and if it `SharesMemory`, what ranks have in common.
    """
    _check_operations(transport)
    _check_aside(transport)
    if isinstance(transport, FormsGroups):
        _check_groups(transport)
    if isinstance(transport, SharesMemory):
        _check_shared(transport)


def _check_operations(transport: Transport) -> None:
    for dtype, shape in ROWS:
        _check_all_to_all(transport, np.dtype(dtype), shape)
    _check_gather(transport)
    transport.barrier()


def _check_aside(transport: Transport) -> None:
    """Check that calls are made in order, beside the caller, and send as the transport does."""
    aside = transport.aside("check") if isinstance(transport, WorksAside) else None
    if aside is None:
        return
    made: list[int] = []
    begun = [
        aside.begin(partial(_exchange_and_note, aside, number, made)) for number in range(len(ROWS))
    ]
    for number, call in enumerate(begun):
        _require(call.end() == number, "end() did not return what the call returned")
    _require(made == sorted(made), f"calls were made in the order {made}")
    aside.begin(partial(_check_gather, aside)).end()
    _check_beside(transport, aside)


def _check_beside(transport: Transport, aside: Aside) -> None:
    """Check that other operations are possible while a call is under way, on each rank its own."""
    if transport.world.rank == 0:  # the others' calls wait for this rank
        transport.barrier()
    call = aside.begin(aside.barrier)
    if transport.world.rank > 0:
        transport.barrier()
    call.end()


def _exchange_and_note(transport: Transport, number: int, made: list[int]) -> int:
    dtype, shape = ROWS[number]
    _check_all_to_all(transport, np.dtype(dtype), shape)
    made.append(number)
    return number


def _check_shared(transport: SharesMemory) -> None:
    """Check that every rank reads what the others wrote, and that each array is a new one."""
    rank, size = transport.world.rank, transport.world.size
    arrays = [transport.shared((size, 3), "<i4") for _ in range(2)]
    have = everyones(transport, [float(array is not None) for array in arrays])
    _require(bool((have == have[0, 0]).all()), "some ranks have memory in common, and others none")
    for number, array in enumerate(arrays):
        if array is not None:
            array[rank] = 10 * rank + number
    transport.barrier()
    for number, array in enumerate(arrays):
        if array is not None:
            expected = np.repeat(10 * np.arange(size)[:, None] + number, 3, axis=1)
            same_form = (array.shape, array.dtype) == ((size, 3), np.dtype("<i4"))
            _require(same_form, f"the array is {array.dtype} {list(array.shape)}")
            _require(bool((array == expected).all()), "ranks do not read what others have written")
    transport.barrier()


def _check_groups(transport: FormsGroups) -> None:
    """Check that the ranks of a group find each other, and that no other rank has to come."""
    world = transport.world
    _check_nodes(transport)
    for together in _groupings(world.size):
        mine = next(ranks for ranks in together if world.rank in ranks)
        group = transport.group(mine)
        _require(
            group.world == world.within(mine),
            f"the world of the group {mine} is {group.world}, and not {world.within(mine)}",
        )
        for _ in range(1 + together.index(mine)):  # groups make different numbers of calls
            _check_operations(group)
        check_exchange(group)
        if isinstance(group, FormsGroups):  # and groups of a group
            _check_operations(group.group([group.world.rank]))


def _groupings(size: int) -> Iterator[list[list[int]]]:
    """Yield ways to share out ranks: halves, every other one, in another order, alone."""
    ranks = list(range(size))
    yield [half for half in (ranks[: size // 2], ranks[size // 2 :]) if half]
    yield [half[::-1] for half in (ranks[::2], ranks[1::2]) if half]
    yield [ranks[::-1]]
    yield [[rank] for rank in ranks]


def _check_nodes(transport: FormsGroups) -> None:
    """Check that all ranks see the same machines, and this one its own place on one of them."""
    world = transport.world
    _require(len(world.nodes) == world.size, f"{world.size} ranks, but nodes {world.nodes}")
    place = World.of(world.rank, world.nodes)
    _require(world == place, f"the world is {world}, and not {place} by its nodes")
    nodes = np.array([world.nodes] * world.size, np.int32)
    everyones, _ = transport.all_to_all(nodes, [1] * world.size)
    _require(bool((everyones == nodes).all()), "the ranks do not see the same nodes")


def _check_all_to_all(transport: Transport, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    rank, size = transport.world.rank, transport.world.size
    counts = [(3 * rank + to) % 4 for to in range(size)]  # some are 0
    rows = np.repeat([_marked(dtype, shape, rank, to) for to in range(size)], counts, axis=0)
    coming = [(3 * source + rank) % 4 for source in range(size)]
    expected = np.repeat([_marked(dtype, shape, s, rank) for s in range(size)], coming, axis=0)
    into = np.zeros_like(expected)
    for known in (), (coming,), (coming, into):
        received, came = transport.all_to_all(rows, counts, *known)
        _require(came == coming, f"counts {came} came")
        _require(
            received.dtype == dtype and received.tobytes() == expected.tobytes(),
            f"rows of {dtype} {shape} came in another order, or with other values",
        )
    _require(into.tobytes() == expected.tobytes(), "rows did not come into the given array")


def _marked(dtype: np.dtype[Any], shape: tuple[int, ...], source: int, to: int) -> Any:
    """Return a row whose bytes say from whom it comes and to whom it goes."""
    row = np.zeros(shape, dtype)
    row.reshape(-1).view(np.uint8)[:] = 16 * (source % 16) + to % 16
    return row


def _check_gather(transport: Transport) -> None:
    rank, size = transport.world.rank, transport.world.size
    expected = np.repeat(np.arange(size), np.arange(size))
    for known in (), (range(size),):
        everyone = transport.gather(np.full((rank, 2), rank, np.float32), *known)
        if rank > 0:
            _require(everyone is None, "gather returned rows on another rank than 0")
            continue
        _require(
            everyone is not None and np.array_equal(everyone, np.c_[expected, expected]),
            "gather did not return every rank's rows in order of rank",
        )


class _Tokens(NamedTuple):
    """A rank's tokens with their experts."""

    x: Floats
    expert_ids: Int32
    expert_weights: Floats


def check_exchange(transport: Transport, memory: Memory = HOST) -> None:
    """Check that a token's products come back and are added in the order of k, bit for bit.

    The experts stand anywhere, on one rank or on several; some ranks hold none, some have no
    tokens; ids of -1 are nobody's.  A rank gets rows for its experts from those ranks alone whose
    tokens it computes.  An exchange that `WorksInPieces` gives each expert all of its rows at once.
    For experts that read 16 bits, rows are float32, or rounded as `lfm2kit.formats.rounded` does.
    If it `TellsWaits`, every rank tells as many, at least one, each with its begin and its end.
    """
    size = transport.world.size
    offer = offered(transport, memory)
    if (why_not := offer.why_not()) is not None:
        raise CheckFailed(f"this rank cannot use the exchange: {why_not}")
    for number, traffic in enumerate(_layers(size)):
        exchange, told = offer.create(traffic), list[bool]()
        for call in range(3):  # whatever an exchange keeps from a call must not reach the next
            told.clear()
            if isinstance(exchange, TellsWaits):
                exchange.tell_waits(told.append if call == 1 else None)
            tokens = [_tokens([number, call, rank], traffic) for rank in range(size)]
            for exchanged in _ways(exchange):
                with offer.around(len(tokens[transport.world.rank].x)):
                    _check_one(transport, offer.memory, exchange, exchanged, traffic, tokens)
            if isinstance(exchange, TellsWaits):
                _check_told(transport, told, is_heard=call == 1)


def _check_told(transport: Transport, told: Sequence[bool], *, is_heard: bool) -> None:
    """Check what an exchange has told of the waits in all calls with the same tokens."""
    count = len(told) // 2
    _require(list(told) == [False, True] * count, "a wait was told that began or ended twice")
    counts = everyones(transport, count).tolist()
    _require(len(set(counts)) == 1, f"the ranks told {counts} waits, which must be as many")
    _require(not is_heard or count > 0, "no wait was told, though every call has some")
    _require(is_heard or not told, f"{count} waits were told after tell_waits(None)")


def _ways(exchange: Exchange) -> Iterator[Callable[..., Any]]:
    """Yield functions of experts and tokens that return delta: all that the exchange can do."""
    yield lambda experts, *tokens: exchange.combine(experts(*exchange.dispatch(*tokens)))
    if isinstance(exchange, WorksInPieces):
        yield exchange.in_pieces


def _layers(size: int) -> Iterator[Traffic]:
    """Yield what travels in layers with experts anywhere, some of which read rows of 16 bits."""
    evenly_held = held_once(evenly(size, 5 * size + 1), size)
    # The even experts are held by every rank, and the others by two, which share out the ranks.
    held_twice = [[(rank % 2 + e) % size for e in range(9)] for rank in range(size)]
    on_several = tuple(
        tuple(owner if e % 2 else rank for e, owner in enumerate(owners))
        for rank, owners in enumerate(held_twice)
    )
    with_none = held_once(evenly(size, max(2, size - 1)), size)  # if there are more than two ranks
    yield Traffic(HIDDEN_SIZE, 3, evenly_held)
    yield Traffic(HIDDEN_SIZE, 2, with_none)
    yield Traffic(ODD_SIZE, 3, on_several, BF16)
    yield Traffic(HIDDEN_SIZE, 4, held_once([(7 * e + 3) % size for e in range(9)], size))
    yield Traffic(HIDDEN_SIZE, 3, evenly_held, F16)
    yield Traffic(HIDDEN_SIZE, 1, held_once([size - 1] * 4, size))
    yield Traffic(HIDDEN_SIZE, 3, on_several)


def _tokens(seed: list[int], traffic: Traffic) -> _Tokens:
    k, num_experts = traffic.num_experts_per_tok, len(traffic.owners[0])
    rng = np.random.default_rng(seed)
    tokens = [0, 11, 3, 1][sum(seed) % 4]
    x = rng.standard_normal((tokens, traffic.hidden_size), np.float32)
    if traffic.row_format != F32:
        x[::2] = np.resize(np.roll(EDGES, seed[1]), x[::2].shape)
    ids = rng.random((tokens, num_experts)).argsort(axis=1)[:, :k].astype(np.int32)
    sizes = 10.0 ** rng.integers(-3, 4, (tokens, k))  # so that the order of adding shows
    weights = (rng.random((tokens, k)) * sizes).astype(np.float32)
    is_nobodys = rng.random((tokens, k)) < 0.2
    is_nobodys[1::5] = True  # tokens of -1 alone
    ids[is_nobodys] = -1
    weights[is_nobodys] = np.nan
    return _Tokens(x, ids, weights)


class _Scaling:
    """Experts that scale, and look at once at what comes: a wrong sum may be seen elsewhere."""

    def __init__(
        self, memory: Memory, traffic: Traffic, rank: int, due: npt.NDArray[np.int64]
    ) -> None:
        self.memory = memory
        self.traffic = traffic
        self.rank = rank
        self.due = due
        self.came = np.zeros_like(due)
        self.rows: list[tuple[int, bytes]] = []  # by expert
        self.has_rounded = False  # whether they have the 16 bits that products read

    def __call__(self, *rows: Any) -> Any:
        x, ids, weights = map(self.memory.to_host, rows)
        _require(ids.shape == weights.shape == (len(x), 1), f"{len(x)} rows, but ids {ids.shape}")
        came = np.bincount(ids[ids >= 0], minlength=len(self.due))
        held = held_by(self.rank, self.traffic.owners)
        strange = sorted({*np.flatnonzero(came).tolist()} - {*held})
        _require(not strange, f"rows came for experts {strange}, which other ranks hold")
        again = np.flatnonzero(np.minimum(came, self.came)).tolist()
        _require(not again, f"the experts {again} were called several times")
        self.came += came
        self.check(np.minimum(self.came, self.due))  # no more have come; others may come yet
        values = self._read(x)
        self.rows += [(int(ids[row, 0]), x[row].tobytes()) for row in np.flatnonzero(ids >= 0)]
        products = _products(values, ids, weights)[:, 0]  # NaN in rows of padding
        return self.memory.from_host(np.ascontiguousarray(products))

    def _read(self, x: npt.NDArray[Any]) -> Floats:
        """Return the values of rows as products read them."""
        row_format = self.traffic.row_format
        types = list(dict.fromkeys([row_format.block, F32.block]))
        _require(
            x.dtype in types, f"rows of {x.dtype} came, and not of {' or '.join(map(str, types))}"
        )
        self.has_rounded = x.dtype == row_format.block
        return row_format.unpack(x if self.has_rounded else rounded(x, row_format))

    def check(self, due: npt.NDArray[np.int64]) -> None:
        """Check that as many rows of each expert have come as are due."""
        _require(
            np.array_equal(self.came, due),
            f"rows {self.came} came by expert, and not {due}, which are this rank's to compute",
        )

    def check_bits(self, everyones: Sequence[_Tokens]) -> None:
        """Check that the rows that have come are those of all ranks' tokens, bit for bit."""
        row_format, due = self.traffic.row_format, []
        for owners, tokens in zip(self.traffic.owners, everyones, strict=True):
            x = rounded(tokens.x, row_format) if self.has_rounded else tokens.x
            for t, k in zip(*np.nonzero(tokens.expert_ids >= 0), strict=True):
                if owners[e := int(tokens.expert_ids[t, k])] == self.rank:
                    due.append((e, x[t].tobytes()))
        _require(
            sorted(self.rows) == sorted(due),
            f"rows came with other bits than those of their tokens in {row_format}",
        )


def _check_one(
    transport: Transport,
    memory: Memory,
    exchange: Exchange,
    exchanged: Callable[..., Any],
    traffic: Traffic,
    everyones: Sequence[_Tokens],
) -> None:
    """Check one call, in which each rank has its tokens of `everyones`, [ranks]."""
    rank, row_format = transport.world.rank, traffic.row_format
    tokens = everyones[rank]
    due = _rows_due(transport, traffic.owners, tokens.expert_ids)
    experts = _Scaling(memory, traffic, rank, due)
    delta = memory.to_host(exchanged(experts, *map(memory.from_host, tokens)))
    experts.check(due)
    experts.check_bits(everyones)
    if isinstance(exchange, Counted):
        counted = exchange.counted().expert_rows
        _require(np.array_equal(counted, due), f"rows {due} came by expert, counted {counted}")
    read = row_format.unpack(rounded(tokens.x, row_format))
    expected = _added(_products(read, *tokens[1:]), tokens.expert_ids)
    _require(
        delta.shape == expected.shape and delta.tobytes() == expected.tobytes(),
        f"delta differs in {np.count_nonzero(delta != expected)} of {expected.size} numbers from "
        "the products added in the order of k"
        if delta.shape == expected.shape
        else f"delta has the shape {delta.shape}, and not {expected.shape}",
    )


def _rows_due(transport: Transport, owners: Owners, ids: Int32) -> npt.NDArray[np.int64]:
    """Return how many rows of each expert all ranks have for this one."""
    experts, world = len(owners[0]), transport.world
    mine = np.bincount(ids[ids >= 0], minlength=experts)
    to = np.array(owners[world.rank]) == np.arange(world.size)[:, None]  # [ranks, experts]
    everyones, _ = transport.all_to_all(np.where(to, mine, 0), [1] * world.size)
    due: npt.NDArray[np.int64] = everyones.sum(axis=0)
    return due


def _products(x: Floats, ids: Int32, weights: Floats) -> Floats:
    """Return the weighted outputs [rows, k, hidden_size] of experts that scale; NaN for -1."""
    scale = np.where(ids < 0, np.float32(np.nan), np.sqrt(ids.astype(np.float32) + 2))
    with np.errstate(over="ignore", under="ignore"):
        outputs: Floats = weights[:, :, None] * (scale.astype(np.float32)[:, :, None] * x[:, None])
    return outputs


def _added(products: Floats, ids: Int32) -> Floats:
    """Return the sum of each token's products in the order of k, without those of -1."""
    delta = np.zeros((len(products), products.shape[2]), np.float32)
    for t, row in enumerate(products):
        taken = np.flatnonzero(ids[t] >= 0)
        if len(taken):
            delta[t] = row[taken[0]]
        for k in taken[1:]:
            delta[t] += row[k]
    return delta


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise CheckFailed(otherwise)
