"""Predicts the time of a job's forwards, and what limits it.

    layer = blocks of the slowest rank + counts and rows + experts of the busiest rank + products

The ranks of a group wait for each other before tokens travel, and before products do.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lfm2kit.building.curves import Curve, Float64
from lfm2kit.building.overlap import NEAR_ONE_ROW
from lfm2kit.exchange_round import WORD
from lfm2kit.ranks.balancing import max_over_mean
from lfm2kit.simulating.jobs import Job
from lfm2kit.simulating.model_rates import ModelRates, Spent
from lfm2kit.simulating.network import Bytes, Network
from lfm2kit.simulating.routing import Routing
from lfm2kit.simulating.sendings import Int64, Sendings


class Limit(enum.StrEnum):
    """What takes most of a job's time."""

    ARITHMETIC = "arithmetic"
    WEIGHTS = "reading weights"
    WAITING = "uneven ranks"
    LATENCY = "latency of messages"
    LINKS = "bytes over links"
    COPIES = "copies of rows"
    GATHER = "gather of logits"


class Parts(NamedTuple):
    """The seconds of an average rank."""

    compute: float
    waiting: float  # for slower ranks of its group
    exchange: float  # that is not hidden
    copies: float  # of rows, around the exchange, and of logits to the host
    gather: float  # of the logits


@dataclass(frozen=True, slots=True)
class Machine:
    """What ranks compute and talk with."""

    rates: ModelRates
    network: Network
    copies: float  # bytes per second
    overlap: float = 0.0  # share of an exchange that is hidden where there is enough to compute
    # The seconds of a layer's exchange within a machine, by the bytes that a rank sends to all
    # others, if its tokens travel between devices; they are copied meanwhile.
    past_host: Curve | None = None
    to_host: float | None = None  # bytes per second of logits from a device


@dataclass(frozen=True, slots=True)
class Predicted:
    """A job's predicted time, memory and messages."""

    seconds: float
    parts: Parts
    limit: Limit
    kept_bytes: int  # of weights, on the rank with most
    sent_bytes: Int64  # by each rank, [ranks], exact for the routing
    sent_messages: Int64  # [ranks]
    rows_max_over_mean: float | None


Done = Callable[[int], None]  # is told layers, each as often as there are ranks


def nothing(layers: int) -> None:
    """Do nothing: nobody watches."""


def predict(
    job: Job, routing: Routing, machine: Machine, vocab_size: int, done: Done = nothing
) -> Predicted:
    """Return what is predicted for a job whose tokens choose the experts of `routing`.

    Tell `done` of each layer.
    """
    clock = _Clock(job, machine)
    sent_bytes, messages = np.zeros(job.ranks, np.int64), np.zeros(job.ranks, np.int64)
    rows: list[Sequence[float]] = []
    for samples in job.forwards():
        counts = np.array([len(mine) for mine in samples], np.int64)
        tokens = counts * routing.seq_len
        clock.compute(machine.rates.embedding.spent(tokens))
        for layer in machine.rates.layers:
            done(job.ranks)
            computed = layer.before.spent(tokens)
            if layer.experts is None:
                clock.compute(computed)
                continue
            sendings = job.sendings(routing, layer.number, samples)
            clock.layer(computed, layer.experts.spent(sendings.expert_rows), sendings)
            for nbytes in _messages(job, sendings):
                sent_bytes += nbytes.sum(axis=1)
                messages += (nbytes > 0).sum(axis=1)
            rows.append(sendings.expert_rows.sum(axis=1).tolist())
        clock.compute(machine.rates.of_all_rows.spent(tokens))
        clock.compute(machine.rates.of_logits.spent(counts))
        clock.to_host(counts * vocab_size)
    gathered = job.gathered(vocab_size)
    to_first = np.zeros((job.ranks, job.ranks), np.int64)
    to_first[:, 0] = [sent.bytes for sent in gathered]
    parts = clock.ended(to_first)
    return Predicted(
        sum(parts),
        parts,
        _limit(parts, clock),
        _kept_bytes(job, machine.rates),
        sent_bytes + to_first[:, 0],
        messages + np.array([sent.messages for sent in gathered]),
        max_over_mean(rows),
    )


class _Clock:
    """The time of each rank, [ranks], and what it was spent on."""

    def __init__(self, job: Job, machine: Machine) -> None:
        self._nodes, self._machine = job.layout.nodes, machine
        self._group = np.zeros(job.ranks, np.intp)
        for number, group in enumerate(job.layout.grouping.groups):
            self._group[list(group)] = number
        self._is_alone = np.array(job.peers) == 0
        nodes = [{job.layout.nodes[rank] for rank in one} for one in job.layout.grouping.groups]
        self._is_within = all(len(of_group) == 1 for of_group in nodes)  # one machine
        self._peers = self._messages_between()
        zeros = (np.zeros(job.ranks) for _ in range(7))
        self._now, self._computed, self.reading, self._waited, *rest = zeros
        self._exchanged, self._copied, self.latency = rest

    def compute(self, spent: Spent) -> None:
        self._now += spent.seconds
        self._computed += spent.seconds
        self.reading += spent.reading

    def layer(self, before: Spent, experts: Spent, sendings: Sendings) -> None:
        """Add a layer in which tokens travel to experts and back."""
        self.compute(before)
        if self._machine.past_host is not None and self._is_within:
            self._past_host(self._machine.past_host, experts, sendings)
            return
        copied = self._copies(sendings)
        self._now += copied
        self._copied += copied
        dispatched, back = sendings.bytes()
        exchanged = self._exchange(WORD * self._peers) + self._exchange(dispatched)
        self.compute(experts)
        exchanged += self._exchange(back)
        self._hide(exchanged, copied, before.seconds + experts.seconds)

    def _past_host(self, call: Curve, experts: Spent, sendings: Sendings) -> None:
        """Add the experts, and an exchange between devices around them, half before and after."""
        dispatched, back = sendings.bytes()
        sent = (dispatched + back).sum(axis=1)
        seconds = self._of_group(call.at(sent) * (np.array(sendings.peers) > 0))
        self._travel(seconds / 2)
        self.compute(experts)
        self._travel(seconds / 2)

    def to_host(self, logits: Int64) -> None:
        """Add the copy of these numbers of logits to the host, [ranks]."""
        if self._machine.to_host is not None:
            seconds = WORD * logits / self._machine.to_host
            self._now += seconds
            self._copied += seconds

    def ended(self, to_first: Bytes) -> Parts:
        """Wait for all ranks, add the gather of the logits, and return the seconds by part."""
        last = float(self._now.max())
        self._waited += last - self._now
        return Parts(
            float(self._computed.mean()),
            float(self._waited.mean()),
            float(self._exchanged.mean()),
            float(self._copied.mean()),
            self._gather(to_first),
        )

    def _gather(self, to_first: Bytes) -> float:
        """Return the seconds of the gather: on one machine, of copies where rank 0 reads them."""
        if len(set(self._nodes)) == 1:
            return float(to_first.max()) / self._machine.copies
        return float(self._machine.network.seconds(to_first, self._nodes).max())

    def _exchange(self, nbytes: Bytes) -> Float64:
        """Wait for the group, exchange these bytes, and return the seconds of it, [ranks]."""
        seconds = self._of_group(self._machine.network.seconds(nbytes, self._nodes))
        one_byte = (nbytes > 0).astype(np.int64)
        self.latency += self._of_group(self._machine.network.seconds(one_byte, self._nodes))
        self._travel(seconds)
        return seconds

    def _travel(self, seconds: Float64) -> None:
        """Wait for the group, and then exchange for these seconds, [ranks]."""
        together = self._of_group(self._now)
        self._waited += together - self._now
        self._now = together + seconds
        self._exchanged += seconds

    def _hide(self, exchanged: Float64, copied: Float64, computed: Float64) -> None:
        """Take back what is hidden of an exchange: a share, and no more than there is to compute.

        Rows are copied in the thread that exchanges them.  This is all that a prediction knows of
        overlap.
        """
        hidden = np.minimum(self._machine.overlap * (exchanged + copied), self._of_group(computed))
        of_exchange = np.minimum(hidden, exchanged)
        self._now -= hidden
        self._exchanged -= of_exchange
        self._copied -= np.minimum(hidden - of_exchange, copied)

    def _copies(self, sendings: Sendings) -> Float64:
        product = WORD * sendings.traffic.hidden_size
        own = np.diagonal(sendings.pairs) * product  # products that a rank sends to itself
        nbytes = np.where(self._is_alone, 0, sendings.copied_bytes() + own)
        return nbytes / self._machine.copies

    def _of_group(self, seconds: Float64) -> Float64:
        """Return the longest of each rank's group, [ranks]."""
        longest = np.zeros(len(seconds))
        np.maximum.at(longest, self._group, seconds)
        return longest[self._group]

    def _messages_between(self) -> Bytes:
        """Return 1 for each two ranks of a group, else 0, [from, to]."""
        is_together: Bytes = (self._group[:, None] == self._group).astype(np.int64)
        np.fill_diagonal(is_together, 0)
        return is_together


def _messages(job: Job, sendings: Sendings) -> list[Bytes]:
    """Return the bytes of each operation of a layer, [from, to]."""
    counts = np.zeros((job.ranks, job.ranks), np.int64)
    for group in job.layout.grouping.groups:
        counts[np.ix_(group, group)] = WORD
    np.fill_diagonal(counts, 0)
    return [counts, *sendings.bytes()]


def _limit(parts: Parts, clock: _Clock) -> Limit:
    is_reading = parts.compute < NEAR_ONE_ROW * clock.reading.mean()
    is_late = clock.latency.mean() > parts.exchange / 2
    limits = {
        Limit.WEIGHTS if is_reading else Limit.ARITHMETIC: parts.compute,
        Limit.WAITING: parts.waiting,
        Limit.LATENCY if is_late else Limit.LINKS: parts.exchange,
        Limit.COPIES: parts.copies,
        Limit.GATHER: parts.gather,
    }
    return max(limits, key=limits.__getitem__)


def _kept_bytes(job: Job, rates: ModelRates) -> int:
    """Return the bytes of the weights of the rank that has most of them."""
    held: npt.NDArray[np.int64] = np.full(job.ranks, rates.kept_bytes, np.int64)
    for layer in rates.layers:
        if layer.experts is not None:
            counts = job.experts_held(layer.number)
            held += np.array(counts) * layer.experts.side.expert_bytes
    return int(held.max())
