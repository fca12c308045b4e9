"""What a calibration measures of blocks and of ranks' exchanges; nothing about real times."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from lfm2kit import specs
from lfm2kit.building.loading import Setup, set_up
from lfm2kit.building.options import Options
from lfm2kit.building.rank_rates import ExchangeKey
from lfm2kit.measuring import block_times, calibration, exchange_times, past_host, together
from lfm2kit.measuring.block_times import block_rates, blocks
from lfm2kit.measuring.calibration import calibrated, measurable
from lfm2kit.measuring.exchange_times import exchange_rates
from lfm2kit.measuring.past_host import past_host_rates
from lfm2kit.measuring.timing import Timing
from lfm2kit.measuring.together import Stopwatch
from lfm2kit.memory import HOST
from lfm2kit.ranks.joining import Alone
from lfm2kit.testing import ThreadTransport, run_ranks
from lfm2kit.weights import Tensor, Weights
from tests.core.test_model import CapturingBackend, FusingBackend
from tests.random_model import RANDOM
from tests.ranks.test_exchanging import Rank, plugins_with

REFERENCE = Options(backend="reference")


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "REPETITIONS", 1)
    monkeypatch.setattr(calibration, "ROWS", (1, 4))
    monkeypatch.setattr(block_times, "ROWS", (1, 20))
    monkeypatch.setattr(exchange_times, "MESSAGES", (4, 64, 4096))
    monkeypatch.setattr(exchange_times, "COPY_BYTES", 1)
    monkeypatch.setattr(past_host, "TOKENS", (1, 20))


def alone() -> Setup:
    return set_up(RANDOM, REFERENCE)


def test_each_block_without_experts_is_measured_once() -> None:
    """A layer that is built whole is taken apart; its router stays whole."""
    first, sparse = RANDOM.spec.layers[0], RANDOM.spec.layers[2]
    assert isinstance(first, specs.Layer)
    assert isinstance(sparse, specs.Layer)
    assert isinstance(sparse.feed_forward, specs.SparseMoe)
    wanted = [
        RANDOM.spec.embed_tokens,
        first.operator_norm,
        first.operator,
        first.feed_forward,
        sparse.feed_forward.router,
        RANDOM.spec.last_rows,
        RANDOM.spec.lm_head,
    ]
    there = {key.block for key in blocks(alone())}
    assert {repr(spec) for spec in wanted} <= there
    assert not [block for block in there if "Experts(" in block]
    assert {key[1:3] for key in blocks(alone())} == {("reference", "fp32")}


def test_equal_blocks_whose_weights_are_in_two_formats_are_both_measured() -> None:
    name = "embedding_norm.weight"
    float32 = Tensor.of_array(name, RANDOM.weights[name].float32())
    weights = Weights({**RANDOM.weights, name: float32})
    there = blocks(set_up(replace(RANDOM, weights=weights), REFERENCE))

    def stored(block: str) -> set[str]:
        return {key.stored for key in there if key.block.startswith(block)}

    assert stored("RMSNorm(") == {"BF16", "F32"}
    assert stored("Router(") == {"BF16 and F32"}  # a bias is F32 in every checkpoint
    assert stored("LastRows(") == {"nothing"}


@pytest.mark.parametrize("whole", [specs.SparseMoe, specs.Layer], ids=lambda kind: kind.__name__)
def test_a_layer_that_is_built_whole_has_its_router_measured(whole: type[specs.Spec]) -> None:
    backend: Any = FusingBackend(whole, lambda *parts: None)
    setup = set_up(RANDOM, Options(backend="reaching"), plugins=plugins_with(backend, "fusing"))
    there = {key.block for key in blocks(setup)}
    sparse = RANDOM.spec.layers[2]
    assert isinstance(sparse, specs.Layer)
    assert isinstance(sparse.feed_forward, specs.SparseMoe)
    assert {repr(sparse.operator_norm), repr(sparse.feed_forward.router)} <= there
    assert not [block for block in there if "Experts(" in block]


def test_as_many_equal_blocks_take_turns_as_no_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    conv, attention = 2 * (3 + 1) * 128 * 128 + 2 * 3 * 128, 6  # bytes, and how many there are
    for nbytes, count in ((1, 1), (conv, 1), (conv + 1, 2), (2**30, 6)):
        monkeypatch.setattr(block_times, "UNCACHED_BYTES", nbytes)
        equal = next(there for key, there in blocks(alone()).items() if "ShortConv(" in key.block)
        assert len({placed.name for placed in equal}) == len(equal) == min(count, attention)


def test_calls_are_timed_as_they_were_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls of a recording take turns, and its time is divided by their number."""
    made: list[int] = []
    seconds = iter([1e-3, 10e-3])  # of a call by itself, and of a replay
    monkeypatch.setattr(
        Stopwatch, "_once", lambda self, call, enqueued: (call(), Timing(next(seconds), None))[1]
    )
    calls = [partial(made.append, i) for i in range(2)]
    taken = Stopwatch(HOST).seconds_recorded(CapturingBackend(), *calls)
    assert made == [0, 1, 0, *[0, 1] * 3]  # each, one that is timed, and 5 ms of them
    assert taken == pytest.approx(10e-3 / 6)


def test_ranks_whose_devices_reach_each_other_are_measured_there() -> None:
    def rank(transport: ThreadTransport) -> Any:
        setup = Rank(transport, {}).setup
        measured, _ = calibrated(setup, measurable(setup))
        return [one for one in measured.exchanges if one.key.memory != HOST.name]

    first, second = run_ranks(2, rank)
    assert first == second
    (one,) = first
    assert one.key == ExchangeKey(2, 1, "elsewhere")
    to_other, back, k = 4 * 128 + 8 * 4, 4 * 128, 4
    assert 0 < one.call.sizes[0] <= to_other + k * back
    assert one.call.sizes[1] == pytest.approx(20 * (0.97 * to_other + 2 * back), rel=0.2)


def test_ranks_of_which_one_cannot_reach_the_other_are_measured_on_the_host_alone() -> None:
    def rank(transport: ThreadTransport) -> Any:
        setup = Rank(transport, {}).setup
        setup.placed.memory.reason = "no" if transport.world.rank else None  # type: ignore[attr-defined]
        return list(past_host_rates(setup, transport))

    assert run_ranks(2, rank) == [[], []]


def test_a_job_measures_the_same_blocks_as_one_process() -> None:
    def rank(transport: ThreadTransport) -> Any:
        return blocks(set_up(RANDOM, REFERENCE, transport=transport)).keys()

    assert run_ranks(2, rank) == [blocks(alone()).keys()] * 2


def test_blocks_get_sequences_of_the_usual_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 rows are one sequence of 16 tokens, and one of 4."""
    given: list[Any] = []

    def seconds(self: Stopwatch, *calls: Any) -> float:
        given.append(calls[0].args)
        calls[0]()
        return 1e-3

    monkeypatch.setattr(Stopwatch, "seconds", seconds)
    measured = list(block_rates(alone(), Alone()))
    batches = [one for arguments in given for one in arguments if hasattr(one, "cu_seqlens")]
    assert {tuple(one.cu_seqlens.tolist()) for one in batches} == {(0, 1), (0, 16, 20)}
    assert {one.call.sizes for one in measured} == {(1, 20)}


def test_every_rank_has_the_seconds_of_the_slowest() -> None:
    def rank(transport: ThreadTransport) -> Any:
        setup = set_up(RANDOM, REFERENCE, transport=transport)
        measured, _ = calibrated(setup, measurable(setup))
        return [one.call for one in (*measured.blocks, *measured.exchanges)], [
            side.product for side in measured.sides
        ]

    first, second = run_ranks(2, rank)
    assert first == second


def test_ranks_of_a_machine_are_measured_by_themselves_and_with_all_others() -> None:
    def keys(*nodes: int) -> Any:
        def rank(transport: ThreadTransport) -> Any:
            return [one.key for one in exchange_rates(transport)]

        return run_ranks(len(nodes), rank, nodes=nodes)

    assert keys(0, 0) == [[ExchangeKey(2, 1)]] * 2
    assert keys(0, 1) == [[ExchangeKey(2, 2)]] * 2
    assert keys(0, 0, 1, 1) == [[ExchangeKey(2, 1), ExchangeKey(4, 2)]] * 4
    assert keys(0, 0, 1) == [[ExchangeKey(2, 1), ExchangeKey(3, 2)]] * 2 + [[ExchangeKey(3, 2)]]
    assert list(exchange_rates(Alone())) == []


def test_a_rank_sends_a_message_to_each_other_one_and_none_to_itself() -> None:
    sent: list[Any] = []

    class Seen(ThreadTransport):
        def all_to_all(self, rows: Any, counts: Any, *more: Any) -> Any:
            if rows.dtype == np.uint8 and self.world.rank == 1:
                sent.append((rows.shape, list(counts)))
            return super().all_to_all(rows, counts, *more)

    (measured,) = run_ranks(3, lambda t: list(exchange_rates(t)), make=Seen)[0]
    assert measured.call.sizes == (4, 64, 4096)
    assert {shape for shape, _ in sent} == {(2, 4), (2, 64), (2, 4096)}
    assert {tuple(counts) for _, counts in sent} == {(1, 0, 1)}


def test_messages_that_would_take_too_long_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange_times, "_seconds", lambda transport, nbytes: nbytes / 64)
    (measured,) = run_ranks(2, lambda t: list(exchange_rates(t)))[0]
    assert measured.call.sizes == (4, 64)


def test_the_ranks_of_a_stopwatch_wait_for_each_other() -> None:
    watch = Stopwatch(HOST)
    assert watch.largest(2.5) == 2.5
    assert run_ranks(3, lambda t: Stopwatch(HOST, t).largest(t.world.rank)) == [2.0] * 3
