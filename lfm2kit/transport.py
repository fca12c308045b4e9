"""What several ranks talk over.  A transport is a plugin too (`lfm2kit_transports`).

The core never imports an MPI: `backends/mpi` announces the transport "mpi".
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from lfm2kit.errors import Option
from lfm2kit.formats import F32, Format
from lfm2kit.memory import Array, Memory
from lfm2kit.pending import Pending

if TYPE_CHECKING:
    from lfm2kit.backend import Block
    from lfm2kit.overlapped import Overlap


class World(NamedTuple):
    """A process's place among the ranks of one job."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1  # ranks on this machine
    nodes: tuple[int, ...] = ()  # the machine of each rank, [size]; () if that is not known

    @classmethod
    def of(cls, rank: int, nodes: Sequence[int]) -> World:
        """Return the place of `rank` among ranks on these machines, [size], whatever their ids."""
        return cls.of_all(nodes)[rank]

    @classmethod
    def of_all(cls, nodes: Sequence[int]) -> list[World]:
        """Return the places of all ranks on these machines, in order of rank."""
        numbers = {node: number for number, node in enumerate(dict.fromkeys(nodes))}
        numbered = tuple(numbers[node] for node in nodes)
        sizes, before = Counter(numbered), Counter[int]()
        worlds = []
        for rank, node in enumerate(numbered):
            worlds.append(cls(rank, len(nodes), before[node], sizes[node], numbered))
            before[node] += 1
        return worlds

    def within(self, ranks: Sequence[int]) -> World:
        """Return this rank's place in a group of `ranks`, as if there were no others.

        The group's rank i is `ranks[i]`.  Ranks whose machines are not known count as on one.
        """
        nodes = self.nodes or (0,) * self.size
        return World.of(ranks.index(self.rank), [nodes[rank] for rank in ranks])


class Transport(Protocol):
    """Collective operations over host arrays; every rank calls each of them, in the same order."""

    @property
    def world(self) -> World: ...

    def all_to_all(
        self,
        rows: npt.NDArray[Any],
        send_counts: Sequence[int],
        receive_counts: Sequence[int] | None = None,
        into: npt.NDArray[Any] | None = None,
    ) -> tuple[npt.NDArray[Any], list[int]]:
        """Send `send_counts[r]` consecutive rows of `rows` to each rank r, in order of r.

        Return the rows that came, those of rank 0 first, and how many each rank sent.  `rows`
        is C-contiguous; all ranks pass one dtype and row shape; counts may be 0.  Once this
        returns, nothing reads `rows` any more: the caller may write there.

        Who knows how many rows come gives `receive_counts`, on every rank: then only rows travel.
        Beside them `into` may be given, a C-contiguous array of as many rows, of the same dtype
        and shape.  The rows are then written there, and it is returned.
        """
        ...

    def gather(
        self, rows: npt.NDArray[Any], counts: Sequence[int] | None = None
    ) -> npt.NDArray[Any] | None:
        """Return all ranks' rows in order of rank, on rank 0; None elsewhere.

        Where `counts`, the number of each rank's rows, is given on every rank, only rows travel.
        """
        ...

    def barrier(self) -> None: ...

    def finish(self, exit_code: int) -> None:
        """Say that this rank's work is done; rank 0's exit code is the job's.

        Every rank calls it once, last of all.  A process that ends before that is a fault, which
        ends the job, whatever its exit code was.
        """
        ...

    def abort(self, exit_code: int, reason: str, details: str = "") -> NoReturn:
        """End every rank's process, and show `reason`, a sentence, with this rank's number.

        Where several ranks call it, one reason is shown.  `details`, a traceback or nothing, are
        shown before it.
        """
        ...


@runtime_checkable
class FormsGroups(Transport, Protocol):
    """Capability: a transport whose ranks can also talk in groups.

    Its world gives the `nodes`.  Without it, experts are shared out over all ranks or not at all.
    """

    def group(self, ranks: Sequence[int]) -> Transport:
        """Return a transport among `ranks` alone, which are different and include this one.

        Rank i of the group is `ranks[i]`, and its world is `world.within(ranks)`.  Send nothing:
        what the group needs is made in its first operation, for which its ranks alone come.
        Meanwhile others may use groups of their own.  A rank calls one operation after another,
        of whichever group, but for calls aside (`WorksAside`).  `finish` is called on the job's
        transport only; `abort` ends the whole job.  The group has the job's capabilities.
        """
        ...


Owners = tuple[tuple[int, ...], ...]  # [ranks][num_experts], see `Traffic`


class Aside(Transport, Protocol):
    """A transport for calls that are made in a thread of their own, beside the caller's work."""

    def begin(self, call: Callable[[], Any]) -> Pending:
        """Begin `call`, which uses operations of this transport, and return at once.

        Calls are made one after the other, in the order in which they are begun, in the context of
        the caller (`contextvars`).  An `all_to_all` and a `gather` of known counts take no core
        while they wait there.  `end()` waits for the call, and returns its result or raises what
        it raised.  If the caller fails, it ends none of those that are left, and nothing may wait
        for them.
        """
        ...


@runtime_checkable
class WorksAside(Transport, Protocol):
    """Capability: a transport whose operations can run beside a rank's computation.

    Without it, nothing is computed while tokens or logits travel.
    """

    def aside(self, purpose: str) -> Aside | None:
        """Return this transport for calls beside the caller's work; None if it is not possible.

        It is possible on all ranks or on none, and the same transport is returned for the same
        purpose.  Those of different purposes, and this transport itself, may be in operations at
        the same time, in any order.  Send nothing.
        """
        ...


@runtime_checkable
class SharesMemory(Transport, Protocol):
    """Capability: a transport whose ranks can have memory in common.

    Without it, logits are sent to rank 0 by `gather`.
    """

    def shared(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any] | None:
        """Return a new array that all ranks have in common; None, on all of them, if there is none.

        Every rank calls this with the same arguments.  What a rank has written before a `barrier`,
        others read after it.  The array holds anything at first.  It lasts as long as a rank keeps
        it, and nothing of it is left when all ranks have ended, however they ended.
        """
        ...


class Traffic(NamedTuple):
    """The data that travels between ranks in one MoE layer.

    Tokens of rank r that chose expert e are sent to rank `owners[r][e]`.  For each rank r it is the
    same one unless several ranks hold the expert.
    """

    hidden_size: int
    num_experts_per_tok: int
    owners: tuple[tuple[int, ...], ...]  # [ranks][num_experts]
    # In which the experts of all ranks read x: F32, BF16 or F16.  An exchange that rounds x before
    # it is sent, as `lfm2kit.formats.rounded` does, sends half of the bytes for 16 bits.  One that
    # knows nothing of this returns float32 rows, which the experts round themselves.
    row_format: Format = F32


class Rows(NamedTuple):
    """The rows for a rank's experts: tokens, each with one expert to compute."""

    x: Array  # [rows, hidden_size]: float32, or what it is rounded to, of `row_format.block`
    expert_ids: Array  # int32 [rows, 1]; -1 in a row of padding, for no expert
    expert_weights: Array  # float32 [rows, 1]


class Exchange(Protocol):
    """An exchange carries one MoE layer's tokens to their experts' ranks, and the products back.

    It may tell when it waits (`lfm2kit.backend.TellsWaits`).

    All arrays lie in its memory.  Every rank calls `dispatch` and then `combine`, layer by layer,
    with no tokens if need be.  Like a block it may return before its result is
    there, if the memory orders the work that is enqueued in it.
    """

    def dispatch(self, x: Array, expert_ids: Array, expert_weights: Array) -> Rows:
        """Send this rank's tokens to their experts' owners, and return the rows that came.

        x is float32 [tokens, hidden_size], expert_ids int32 and expert_weights float32 [tokens, k].
        An id of -1 stands for no expert: nothing is sent for it, whatever its weight is.  Rows may
        come in any order.  An exchange of fixed size fills up with rows whose id is -1.
        The rows stay as they are until the next `dispatch` of any layer, which may reuse their
        memory.
        """
        ...

    def combine(self, products: Array) -> Array:
        """Send each row's product back, and return delta, float32 [tokens, hidden_size].

        products is float32 [rows, hidden_size], in the order of the rows that `dispatch` returned;
        those of padding may hold anything.  A token's products are added at its own rank in the
        order of k, beginning with the first: so the bits do not depend on where experts are.
        Nothing is added for an id of -1, and a token of -1 alone has a delta of +0.
        """
        ...


@runtime_checkable
class WorksInPieces(Exchange, Protocol):
    """Capability of an exchange: a rank computes some of its experts while other tokens travel.

    The pieces are of a rank's experts.  Without it, nothing is computed meanwhile.
    """

    def in_pieces(
        self, experts: Block, x: Array, expert_ids: Array, expert_weights: Array
    ) -> Array:
        """Return `combine(experts(*dispatch(x, expert_ids, expert_weights)))`, with the same bits.

        Call `experts` for each piece, with all rows of these experts, as soon as they have come;
        meanwhile send those of the next pieces, and the products of those before.  Where `experts`
        raises, let that pass at once, and wait for no other rank.  For a layer, either all ranks
        call this, or all call `dispatch` and `combine`.
        """
        ...


def _nothing_around(tokens: int) -> AbstractContextManager[Hashable]:
    return nullcontext()


@dataclass(frozen=True, slots=True)
class ExchangeOffer:
    """An exchange that can be had for arrays in `memory`."""

    memory: Memory
    create: Callable[[Traffic], Exchange]  # called for each MoE layer when a model is built
    # Whether both operations can be recorded and replayed.  To record a step, a backend may first
    # call it on this rank alone; other ranks do not call theirs then.
    is_capturable: bool = False
    # The bytes that exchanges take in `memory`, those of all layers together, for forwards of as
    # many tokens on each rank, which choose experts evenly: buffers, the rows that are handed out
    # and the products that are handed in.  An exchange that does not say counts as none.
    scratch_bytes: Callable[[Traffic, int], int] = lambda traffic, tokens: 0
    # Tries the exchange out together with the other ranks, and returns why this rank cannot use it,
    # in a few words; None if it can.  All ranks call it before a model is built, once they have
    # found that they run the same.  If one of them cannot, all exchange through the host.
    why_not: Callable[[], str | None] = lambda: None
    # A context around each forward, given the number of this rank's tokens.  Every rank enters it
    # for each of its forwards, so that they can settle what depends on the number of everyone's
    # tokens.  A recorded forward is replayed only while the value of the context stays the same.
    # Leaving it raises `ExchangeError` if the exchange has failed in this forward.
    around: Callable[[int], AbstractContextManager[Hashable]] = _nothing_around


class ExchangeError(Exception):
    """The failure of one layer's exchange: "rank 1 has sent nothing for 60 s".

    The model adds the layer's name.
    """

    def __init__(self, exchange: Exchange | None, *sentence: str | Option) -> None:
        super().__init__(*sentence)
        self.exchange = exchange


@runtime_checkable
class Exchanges(Protocol):
    """Capability: a transport with exchanges in memories of its own, past the host.

    Without it, tokens are exchanged by `all_to_all`, in the host's memory.
    """

    def exchange_in(self, memory: Memory) -> ExchangeOffer | None:
        """Return the exchange for blocks in `memory`; None if there is none, on every rank.

        Take no memory and send nothing; the offer's memory has the name of `memory`.
        """
        ...


@runtime_checkable
class ExchangesOver(Protocol):
    """Capability: a memory in which tokens travel past the host, over whatever transport.

    It is asked where the transport has no exchange of its own for this memory.
    """

    @property
    def name(self) -> str: ...

    def exchange_over(self, transport: Transport) -> ExchangeOffer | None:
        """Return the exchange among the ranks of `transport`; None if there is none, on every rank.

        Take no memory and send nothing.  Whether it works on this machine is found out later, by
        `ExchangeOffer.why_not`, which may use the transport.
        """
        ...


@dataclass(slots=True)
class Sent:
    """What a rank has sent to other ranks by one of an exchange's collective operations."""

    messages: int = 0  # that had any bytes: at most one to each rank and call
    rows: int = 0
    bytes: int = 0  # headers included
    header_bytes: int = 0  # of ids, weights and counts
    # In which the rank did nothing else; most of them it waited for the slowest rank.
    seconds: float = 0.0

    @contextmanager
    def waiting(self, told: Callable[[bool], None] | None = None) -> Iterator[None]:
        """Count the seconds that the caller spends inside, and tell of both ends."""
        if told is not None:
            told(False)
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start
        if told is not None:
            told(True)

    def add(self, counts: Sequence[int], row_bytes: int, header_bytes: int = 0) -> None:
        """Count a call that sends `counts` rows of `row_bytes`, headers included, to the others."""
        self.messages += sum(count > 0 for count in counts)
        self.rows += sum(counts)
        self.bytes += row_bytes * sum(counts)
        self.header_bytes += header_bytes * sum(counts)

    def __add__(self, other: Sent) -> Sent:
        return Sent(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(slots=True)
class ExchangeCounts:
    """The work of one layer's exchange on one rank.  What a rank sends to itself is not sent."""

    counts: Sent  # how many rows will come
    dispatch: Sent
    combine: Sent
    copied_rows: int  # that the rank copied, or added, before and after these operations
    expert_rows: npt.NDArray[np.int64]  # that this rank's experts were given, [num_experts]

    def __add__(self, other: ExchangeCounts) -> ExchangeCounts:
        values = (getattr(self, f.name) + getattr(other, f.name) for f in fields(self))
        return ExchangeCounts(*values)


@runtime_checkable
class Counted(Protocol):
    """Capability of an exchange: it counts what it sends.  `lfm2kit run --json` reports it."""

    def counted(self) -> ExchangeCounts:
        """Return the counts of all calls since this was last asked, and begin again at 0.

        It may wait for the memory's work.
        """
        ...


@runtime_checkable
class Exchanging(Protocol):
    """Capability of a joined block: it sends tokens by an exchange, whose counts are reported.

    The core sets `overlap` when the model is built.  At each call the block asks `overlap.is_on`,
    and calls the exchange `in_pieces` where that is true.  Where it is None, the block tells
    `overlap.note` how long it computed and exchanged.
    """

    exchange: Exchange
    overlap: Overlap


class Launcher(Protocol):
    """A way to start a job of several ranks, and to tell whether a process is part of one."""

    def world_size(self) -> int | None:
        """Return the number of ranks of this process's job; None outside any job.

        Read the environment only: nothing is initialised.
        """
        ...

    def launch(self, ranks: int, arguments: Sequence[str]) -> int:
        """Run `rank_command(arguments)` on `ranks` ranks; the exit code that rank 0 finished with.

        Raise `Lfm2kitError` where no launcher is installed, and `JobError` where a rank fails,
        ends early or makes no progress (see `lfm2kit.progress`).  Ctrl-C, SIGTERM and SIGHUP come
        as KeyboardInterrupt, which is let pass.  No process of the job is left in any case.
        """
        ...

    def connect(self) -> Transport:
        """Join the job and return this rank's transport; called in every process of a job.

        No other plugin is loaded yet, and no device is in use.  A transport that hands a device's
        memory to MPI chooses the device here, by the launcher's local rank, and then starts MPI.
        From here on the job is watched: a rank that makes no progress ends it.
        Raise `Lfm2kitError` where the job cannot be joined.
        """
        ...


class JobError(Exception):
    """A job that ended before its result: which rank, where, and why, in a sentence."""

    def __init__(self, sentence: str, exit_code: int, details: str = "") -> None:
        super().__init__(sentence)
        self.exit_code = exit_code
        self.details = details


@dataclass(frozen=True, slots=True)
class TransportPlugin:
    """A transport as a plugin announces it, which must be free to make."""

    name: str
    summary: str
    launcher: Launcher


# The options of this interpreter that decide what is imported, and how, by their flags.
_OPTIONS = {"isolated": "I", "ignore_environment": "E", "no_user_site": "s", "no_site": "S"}


def rank_command(arguments: Sequence[str]) -> list[str]:
    """Return the command of a process that runs `lfm2kit *arguments` with this one's code.

    It has this process's interpreter and `sys.path`.  `python -m lfm2kit` would look into the
    current folder first, even where the user's own command does not.
    """
    options = [f"-{letter}" for flag, letter in _OPTIONS.items() if getattr(sys.flags, flag)]
    options += ["-O"] * sys.flags.optimize
    path = [os.path.abspath(entry) for entry in sys.path]
    code = f"import sys; sys.path[:] = {path!a}; from lfm2kit.__main__ import script; script()"
    return [sys.executable, "-P", *options, "-c", code, *arguments]


def everyones(transport: Transport, mine: npt.ArrayLike) -> npt.NDArray[Any]:
    """Return what each rank gives, [ranks, ...]; all give arrays of one shape and dtype."""
    size = transport.world.size
    each = [1] * size
    came, _ = transport.all_to_all(np.stack([np.asarray(mine)] * size), each, each)
    return came


def share(count: int, size: int, rank: int) -> range:
    """Return `rank`'s part of `range(count)`: contiguous, sizes differ by one at most."""
    return range(count * rank // size, count * (rank + 1) // size)


def evenly(size: int, num_experts: int) -> list[int]:
    """Return the rank that holds each expert if `share` gives `size` ranks theirs, [experts]."""
    return [((e + 1) * size - 1) // num_experts for e in range(num_experts)]


def held_once(holders: Sequence[int], size: int) -> Owners:
    """Return the owners where one of `size` ranks holds each expert: `holders`, [experts]."""
    return (tuple(holders),) * size


def held_by(rank: int, owners: Owners) -> tuple[int, ...]:
    """Return the experts that `rank` computes for any rank's tokens, in ascending order."""
    return held_by_all(owners)[rank]


def held_by_all(owners: Owners) -> list[tuple[int, ...]]:
    """Return what `held_by` returns for each rank, [ranks]."""
    held: list[set[int]] = [set() for _ in owners]
    for of_one_rank in set(owners):  # most ranks, or all, have the same ones
        for expert, owner in enumerate(of_one_rank):
            held[owner].add(expert)
    return [tuple(sorted(experts)) for experts in held]
