"""Ranks find out together whether tokens can travel past the host, and all do the same."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import lfm2kit
from lfm2kit.backend import BackendPlugin, Batch, Context
from lfm2kit.building.loading import set_up
from lfm2kit.building.options import Options
from lfm2kit.building.plugins import Plugins
from lfm2kit.cli.performing import exchange_of
from lfm2kit.errors import Lfm2kitError
from lfm2kit.memory import HOST
from lfm2kit.ranks.joining import settled_alike
from lfm2kit.testing import ThreadTransport, check_exchange, run_ranks
from lfm2kit.transport import ExchangeError, ExchangeOffer
from tests.core.test_model import DeviceBackend, Elsewhere, Recorded
from tests.random_model import RANDOM
from tests.rewrites.test_experts_over_ranks import DeviceExchange, Padded, share_of


class Reaching(Elsewhere):
    """A memory with an exchange over any transport, which notes who asks for it."""

    def __init__(self, transport: ThreadTransport, reason: str | None) -> None:
        super().__init__()
        self.reason = reason
        self.made: list[Any] = []
        self.forwards: list[int] = []
        self.failing: Any = None

    def exchange_over(self, transport: Any) -> ExchangeOffer | None:
        def why_not() -> str | None:
            transport.barrier()  # all ranks of the group come, also those with a reason
            return self.reason

        def create(traffic: Any) -> DeviceExchange:
            self.made.append(DeviceExchange(transport, traffic))
            return self.made[-1]

        around = partial(self._around, transport)
        return ExchangeOffer(self, create, is_capturable=True, why_not=why_not, around=around)

    @contextmanager
    def _around(self, transport: Any, tokens: int) -> Iterator[Hashable]:
        self.forwards.append(tokens)
        yield max(transport.everyones(tokens))
        if self.failing is not None:
            raise ExchangeError(self.failing, "rank 1 has sent nothing")


class Capturing(Padded):
    """A backend in that memory, which notes what its replays were captured for."""

    def __init__(self, there: Reaching) -> None:
        super().__init__()
        self.there = there
        self.captured = 0

    def capture(self, step: Callable[[Batch], Any], batch: Batch) -> Recorded:
        self.captured += 1
        return Recorded(lambda batch: step(batch.on(self.there)), 1, [0])


def plugins_with(backend: DeviceBackend, name: str) -> Plugins:
    """Return plugins of which one announces `backend` as "reaching"."""

    def backends() -> Iterator[BackendPlugin]:
        def create(context: Context) -> Any:
            return backend

        yield BackendPlugin("reaching", "a device", create, api_version=1)

    module = ModuleType(name)
    module.lfm2kit_backends = lfm2kit.hookimpl(backends, specname="lfm2kit_backends")  # type: ignore[attr-defined]
    sys.modules[name] = module
    return Plugins([EntryPoint("reaching", name, "lfm2kit")])


class Rank:
    """A rank's set-up, settled with the others."""

    def __init__(
        self, transport: ThreadTransport, reasons: dict[int, str], exchange: str = "auto"
    ) -> None:
        rank = transport.world.rank
        self.memory = Reaching(transport, reasons.get(rank))
        self.backend = Capturing(self.memory)
        plugins = plugins_with(self.backend, f"reaching_{rank}")
        options = Options(backend="reaching", exchange=exchange)
        setup = set_up(RANDOM, options, transport=transport, plugins=plugins)
        self.setup = settled_alike(transport, setup)


def settled(reasons: dict[int, str], exchange: str = "auto") -> Any:
    return run_ranks(2, lambda transport: Rank(transport, reasons, exchange))


def test_where_every_rank_can_tokens_travel_past_the_host() -> None:
    for rank in settled({}):
        assert exchange_of(rank.setup) == {"asked": "auto", "memory": "elsewhere", "why": None}
        assert rank.setup.placed.copies() == 0
        assert rank.setup.placed.is_capturable
        assert list(rank.setup.notes()) == []


def test_where_one_rank_cannot_all_exchange_through_the_host_and_say_why() -> None:
    for rank in settled({1: "its device sees no other"}):
        why = "rank 1: its device sees no other"
        assert exchange_of(rank.setup) == {"asked": "auto", "memory": HOST.name, "why": why}
        assert list(rank.setup.notes()) == [f"tokens travel through the host's memory: {why}"]
        assert not rank.setup.placed.is_capturable
        assert rank.memory.made == []


@pytest.mark.parametrize(
    ("reasons", "said"),
    [({1: "its device sees no other"}, "rank 1: its device sees no other"),
     ({0: "no peers", 1: "no peers"}, "no peers")],
)  # fmt: skip
def test_an_exchange_past_the_host_that_is_asked_for_and_impossible_is_an_error_on_every_rank(
    reasons: dict[int, str], said: str
) -> None:
    def rank(transport: ThreadTransport) -> str:
        with pytest.raises(Lfm2kitError) as error:
            Rank(transport, reasons, "device")
        transport.barrier()
        return str(error.value)

    assert set(run_ranks(2, rank)) == {f"exchange='device': {said}; try exchange='auto'"}


def test_no_memory_is_tried_where_tokens_are_to_travel_through_the_host() -> None:
    for rank in settled({1: "never said"}, "host"):
        assert exchange_of(rank.setup) == {"asked": "host", "memory": HOST.name, "why": None}
        assert list(rank.setup.notes()) == []


def test_a_plan_without_such_a_memory_cannot_be_asked_for_it() -> None:
    def rank(transport: ThreadTransport) -> str:
        options = Options(backend="reference", exchange="device")
        with pytest.raises(Lfm2kitError) as error:
            settled_alike(transport, set_up(RANDOM, options, transport=transport))
        return str(error.value)

    why = "neither the transport nor a memory of the plan has an exchange past the host"
    assert set(run_ranks(2, rank)) == {f"exchange='device': {why}; try exchange='auto'"}


@pytest.mark.parametrize("more", [{}, {"parallel": "dp"}])
def test_a_rank_that_exchanges_nothing_cannot_be_asked_for_it(more: dict[str, str]) -> None:
    with pytest.raises(Lfm2kitError, match=r"exchange='device': there is only one rank; start"):
        set_up(RANDOM, Options(backend="reference", exchange="device", **more))


def test_the_exchange_of_a_memory_keeps_the_contract() -> None:
    run_ranks(3, lambda transport: check_exchange(transport, Reaching(transport, None)))


def test_a_check_says_why_a_rank_cannot_use_an_exchange() -> None:
    def rank(transport: ThreadTransport) -> None:
        with pytest.raises(Exception, match="cannot use the exchange: no peers"):
            check_exchange(transport, Reaching(transport, "no peers"))

    run_ranks(2, rank)


def test_a_replay_is_used_only_while_what_ranks_have_settled_stays_the_same() -> None:
    """The other rank's batch decides it: this rank's batch has the same form all the time."""

    def rank(transport: ThreadTransport) -> Any:
        made = Rank(transport, {})
        model = made.setup.build()
        alone = set_up(RANDOM, Options(backend="reference")).build()
        small, large = share_of(1, 2), Batch.of_sequences([[1] * 9] * 3)
        for of_other in (small, small, large, large, small):
            batch = small if transport.world.rank == 0 else of_other
            assert np.array_equal(model.logits(batch), alone.logits(batch))
        assert made.memory.forwards[-1] == small.tokens
        return made.backend.captured, len(made.memory.forwards)

    assert run_ranks(2, rank) == [(2, 5), (2, 5)]


def test_an_exchange_that_fails_is_named_by_its_layer() -> None:
    def rank(transport: ThreadTransport) -> None:
        made = Rank(transport, {})
        model = made.setup.build()
        made.memory.failing = made.memory.made[1]
        said = r"^layers\.3\.feed_forward: rank 1 has sent nothing$"
        with pytest.raises(Lfm2kitError, match=said):
            model.logits(share_of(transport.world.rank, 2))

    run_ranks(2, rank)
