"""What the ranks that exchange tokens between their GPUs have in common, and what they settle.

The ranks of a transport have one meeting, whatever models they run, and keep it: memory that
others have mapped can only be given back together.  Before each forward they tell each other how
many tokens they have.  The most that any of them has decides the shapes of the forward's arrays.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from threading import RLock
from weakref import WeakValueDictionary

from lfm2kit.building.byte_counts import size
from lfm2kit.errors import Lfm2kitError, Option
from lfm2kit.memory import Memory
from lfm2kit.progress import COMPILING, THIS_PROCESS, longest_of
from lfm2kit.transport import ExchangeError, ExchangeOffer, Traffic, Transport, everyones
from lfm2kit_cuda.constants import EXCHANGE
from lfm2kit_cuda.device import on_device
from lfm2kit_cuda.exchange import PeerExchange
from lfm2kit_cuda.exchange_size import Size
from lfm2kit_cuda.mailboxes import Mailboxes
from lfm2kit_cuda.peers import LEAST_BYTES, PeerError, Peers

MULTIPLE = 64  # of the tokens that mailboxes have room for
# Of the seconds that a step may take: a job's watch must not blame a rank that waits for another.
PATIENCE = 0.8
MOST_SEEN = 4096
LATE = 0  # the kind of a cause in exchange.cu; 1: the host gave up


class Meeting:
    """The ranks of `transport`, each with a GPU of its own: this process's is `device`."""

    def __init__(self, device: int, transport: Transport) -> None:
        self.device = device
        self.world = transport.world
        self.slots = 0  # tokens of each rank that a forward has room for
        self._transport = transport
        self._lock = RLock()
        self._most = Size(0, 1, 1, 1)
        self._mailboxes: Mailboxes | None = None
        self._generation = 0  # of the mailboxes, whose addresses graphs have
        self._exchanges: WeakValueDictionary[int, PeerExchange] = WeakValueDictionary()
        self._created = 0
        self._seen: set[tuple[int, ...]] = set()  # tokens of all ranks in forwards up to now

    def offer(self, memory: Memory) -> ExchangeOffer:
        return ExchangeOffer(
            memory,
            self.create,
            is_capturable=True,
            scratch_bytes=self.scratch_bytes,
            why_not=self.why_not,
            around=self.around,
        )

    def scratch_bytes(self, traffic: Traffic, tokens: int) -> int:
        """Return the bytes that exchanges of this traffic take for `tokens` tokens of each rank."""
        return Size.of(traffic, _rounded(tokens)).scratch_bytes(self.world.size)

    def create(self, traffic: Traffic) -> PeerExchange:
        exchange = PeerExchange(self, self._created, traffic)
        self._exchanges[self._created] = exchange
        self._created += 1
        self._most = self._most.covering(Size.of(traffic))
        return exchange

    def why_not(self) -> str | None:
        """Return why this rank cannot exchange tokens here; every rank calls this."""
        if self.world.size > EXCHANGE.MOST_RANKS:
            return f"{self.world.size} ranks share experts, of at most {EXCHANGE.MOST_RANKS}"
        if len(set(self.world.nodes)) > 1:
            return "the ranks that share experts are on several machines"
        try:
            with on_device(self.device):
                peers = Peers(self._transport, LEAST_BYTES)
                try:
                    peers.greet()
                finally:
                    peers.close()
        except PeerError as error:
            return error.reason if error.rank == self.world.rank else None
        return None

    @contextmanager
    def around(self, tokens: int) -> Iterator[Hashable]:
        """Give a forward with this many tokens its surroundings; every rank enters it.

        The value is what the shapes and addresses in a captured forward depend on.
        """
        with self._lock, on_device(self.device):
            brought = tuple(everyones(self._transport, tokens).tolist())
            self.slots = max(1, *brought)
            self._check()  # after a failure no forward is begun
            self._make_room()
            self.mailboxes.begin(self._deadline(brought))
            try:
                yield self.slots, self._generation
            except BaseException:
                self.mailboxes.give_up()
                raise
            self._check()

    @property
    def mailboxes(self) -> Mailboxes:
        assert self._mailboxes is not None, "mailboxes are made before the first forward"
        return self._mailboxes

    def _deadline(self, brought: tuple[int, ...]) -> float:
        """Return how long a rank may wait for another in a forward of these tokens.

        Longer in the first one, in which the other may have to compile a kernel.
        """
        allowed = PATIENCE * longest_of(THIS_PROCESS.allowed)
        if brought in self._seen:
            return allowed
        if len(self._seen) >= MOST_SEEN:
            self._seen.clear()
        self._seen.add(brought)
        return allowed + COMPILING

    def _make_room(self) -> None:
        """Make larger mailboxes if this forward needs them, as every other rank does then."""
        needed = self._most.covering(Size(_rounded(self.slots), 1, 1, 1))
        if self._mailboxes is not None:
            if self._mailboxes.size.covering(needed) == self._mailboxes.size:
                return
            self._give_back(self._mailboxes)
        self._generation += 1
        try:
            self._mailboxes = Mailboxes(self._transport, needed)
        except PeerError as error:
            nbytes = size(needed.nbytes(self.world.size))
            raise Lfm2kitError(
                f"{error}; the exchange between GPUs needs {nbytes} on each, for "
                f"{self.slots} tokens of each rank; try fewer tokens at once, or ",
                Option("exchange", "host"),
            ) from None
        self._most = needed  # not before: what was too much is not asked for again

    def _give_back(self, mailboxes: Mailboxes) -> None:
        self._mailboxes = None
        try:
            mailboxes.close()
        except PeerError as error:
            raise Lfm2kitError(
                f"{error}; its GPU cannot give back the exchange's memory: start the job again"
            ) from None

    def _check(self) -> None:
        """Raise `ExchangeError` if an exchange has failed."""
        cause = None if self._mailboxes is None else self._mailboxes.cause()
        if cause is None:
            return
        who = f"rank {cause.rank} of the {self.world.size} that share experts"
        exchange = self._exchanges.get(cause.layer)
        if cause.kind != LATE:
            raise ExchangeError(exchange, f"{who} has given up")
        raise ExchangeError(
            exchange,
            f"{who} has sent nothing for {self.mailboxes.deadline:g} s; if it is only slow, give a "
            "longer ",
            Option("deadline"),
        )


def _rounded(tokens: int) -> int:
    """Return how many tokens of each rank mailboxes have room for, to hold these."""
    return -(-tokens // MULTIPLE) * MULTIPLE
