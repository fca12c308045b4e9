"""Experts in pieces on ranks that are threads: the bits of one process, and who decides."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest

from lfm2kit.backend import Batch, Block, Spec
from lfm2kit.building.builder import Builder, build_model
from lfm2kit.building.placement import Placer
from lfm2kit.building.plan import Plan
from lfm2kit.errors import Lfm2kitError
from lfm2kit.host_exchange import PIECES
from lfm2kit.measuring import exchanged
from lfm2kit.model import JOINS, LFM2
from lfm2kit.overlapped import Overlap
from lfm2kit.rewrites import rewritten
from lfm2kit.rewrites.experts_over_ranks import experts_over_ranks
from lfm2kit.rewrites.trim import TRIM
from lfm2kit.state import Room
from lfm2kit.testing import ThreadTransport, run_ranks
from lfm2kit.transport import Sent
from tests.core.small import build, creator, random_weights, small_spec
from tests.core.test_model import DeviceBackend
from tests.rewrites.test_experts_over_ranks import DeviceTransport, share_of

PLAIN = "reference"


def built(
    transport: ThreadTransport,
    overlap: str = "on",
    *,
    rewrites: Sequence[Any] = (),
    plan: str = PLAIN,
    backends: Any = None,
    **builder: Any,
) -> LFM2:
    """Return this rank's share of a small model."""
    backends = {} if backends is None else backends
    spec = small_spec()
    weights = random_weights(spec)
    over_ranks = experts_over_ranks(transport.world, transport)
    model, joins = rewritten(spec, JOINS, [*rewrites, over_ranks])
    placer = Placer(Plan.parse(plan), creator(backends), joins, [PLAIN, *backends])
    ready = Builder(weights, creator(backends), **builder)
    default = Plan.parse(plan).default
    return build_model(placer.place(model), ready, default, transport, overlap)


@pytest.mark.parametrize("rewrites", [[], [TRIM]], ids=["whole", "trimmed"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_logits_have_the_bits_of_one_process(size: int, rewrites: list[Any]) -> None:
    """The sequences are ragged; from three ranks on, one has none, and another has one."""

    def rank(transport: ThreadTransport) -> Any:
        model = built(transport, rewrites=rewrites)
        assert model.overlap.is_on
        batches = [share_of(transport.world.rank, size), Batch.of_sequences([])]
        return [model.logits(batch) for batch in [*batches, batches[0]]]

    alone = build(small_spec())
    for number, (first, empty, again) in enumerate(run_ranks(size, rank)):
        expected = alone.logits(share_of(number, size))
        assert np.array_equal(first, expected)
        assert np.array_equal(again, expected)
        assert empty.shape == (0, expected.shape[1])


def test_sequences_go_on_from_a_state_too() -> None:
    chunks = [[[3, 1], [4], [1, 5, 9]], [[2, 6, 5], [3], [5]], [[8], [9], [7]]]

    def steps(model: LFM2) -> list[Any]:
        state, starts, logits = model.new_state(Room.of_sequences(3, 8)), [0, 0, 0], []
        for chunk in chunks:
            batch = Batch.of_sequences(chunk, starts=starts, pages=[[0], [1], [2]])
            logits.append(model.logits(batch, state))
            starts = [start + len(row) for start, row in zip(starts, chunk, strict=True)]
        return logits

    expected = steps(build(small_spec()))
    for logits in run_ranks(2, lambda transport: steps(built(transport))):
        assert all(map(np.array_equal, logits, expected))


def around_a_layer(name: str, spec: Spec, block: Block) -> Block:
    return (lambda *inputs: block(*inputs)) if name == "layers.3" else block


@pytest.mark.parametrize(
    "more", [{"wrap": around_a_layer}, {"plan": "device"}], ids=["a wrapper", "copies to the host"]
)
def test_whatever_is_around_an_moe_it_overlaps(more: dict[str, Any]) -> None:
    def rank(transport: ThreadTransport) -> Any:
        model = built(transport, backends={"device": DeviceBackend()}, **more)
        assert model.overlap.is_on
        return model.logits(share_of(transport.world.rank, 2))

    for number, logits in enumerate(run_ranks(2, rank)):
        assert np.array_equal(logits, build(small_spec()).logits(share_of(number, 2)))


class Late(ThreadTransport):
    """A transport some of whose messages beside the computation wait for an event.

    In each layer there are two messages of counts, those of tokens, and those of products.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.waits: dict[int, threading.Event] = {}

    def aside(self, purpose: str) -> Any:
        aside: Any = super().aside(purpose)
        send, numbers = aside.all_to_all, iter(range(100))

        def late(*arguments: Any) -> Any:
            event = self.waits.get(next(numbers))
            assert event is None or event.wait(60), "nothing happens meanwhile"
            return send(*arguments)

        aside.all_to_all = late  # type: ignore[method-assign]
        return aside


SECOND_TOKENS, FIRST_PRODUCTS = 3, 2 + PIECES


def test_experts_compute_while_tokens_of_others_and_products_travel() -> None:
    def rank(transport: Any) -> None:
        computed = [threading.Event() for _ in range(PIECES)]
        transport.waits = {SECOND_TOKENS: computed[0], FIRST_PRODUCTS: computed[1]}
        calls = iter(computed)

        def wrap(name: str, spec: Spec, block: Block) -> Block:
            def called(*inputs: Any) -> Any:
                result = block(*inputs)
                next(calls).set()
                return result

            return called if name == "layers.2.feed_forward.experts" else block

        built(transport, wrap=wrap).logits(share_of(transport.world.rank, 2))

    run_ranks(2, rank, make=Late)


def test_a_rank_that_fails_does_not_wait_for_messages_under_way() -> None:
    failed = threading.Event()

    def rank(transport: Any) -> None:
        def fails(*inputs: Any) -> Any:
            raise RuntimeError("no more memory")

        def wrap(name: str, spec: Spec, block: Block) -> Block:
            is_here = transport.world.rank == 0 and name == "layers.2.feed_forward.experts"
            return fails if is_here else block

        if transport.world.rank == 1:
            transport.waits = {SECOND_TOKENS: failed}
        model = built(transport, wrap=wrap)
        try:
            model.logits(share_of(transport.world.rank, 2))
        finally:
            failed.set()

    with pytest.raises(RuntimeError, match="no more memory"):
        run_ranks(2, rank, make=Late)


def test_pieces_send_the_same_rows_as_a_whole() -> None:
    def rank(transport: ThreadTransport, overlap: str) -> Any:
        model = built(transport, overlap)
        exchanged.begin(model)
        model.logits(share_of(transport.world.rank, 2))
        told = exchanged.ended(model, transport, Sent(), [[0, 1]])
        return None if told is None else told.document(1.0)["layers"]

    on, off = (run_ranks(2, partial(rank, overlap=mode))[0] for mode in ("on", "off"))
    for with_overlap, without in zip(on, off, strict=True):
        for operation in "dispatch", "combine":
            rows = with_overlap[operation]["rows"], with_overlap[operation]["bytes"]
            assert rows == (without[operation]["rows"], without[operation]["bytes"])
        assert with_overlap["rows_by_expert"] == without["rows_by_expert"]
        assert with_overlap["copied_rows"] == without["copied_rows"]
        assert with_overlap["counts"]["messages"] == [2, 2]


@pytest.mark.parametrize("call", [1, 3], ids=["the first piece", "a later piece"])
def test_a_rank_that_fails_while_tokens_travel_ends_the_others_and_leaves_no_thread(
    call: int,
) -> None:
    def rank(transport: ThreadTransport) -> Any:
        calls = iter(range(1, 100))

        def wrap(name: str, spec: Spec, block: Block) -> Block:
            def fails(*inputs: Any) -> Any:
                if next(calls) == call:
                    raise RuntimeError("no more memory")
                return block(*inputs)

            is_here = transport.world.rank == 1 and name == "layers.3.feed_forward.experts"
            return fails if is_here else block

        return built(transport, wrap=wrap).logits(share_of(transport.world.rank, 3))

    with pytest.raises(RuntimeError, match="no more memory"):
        run_ranks(3, rank)
    for thread in threading.enumerate():
        if thread.name == "exchange":
            thread.join(60)
            assert not thread.is_alive()


@pytest.mark.parametrize(
    ("milliseconds", "is_on"),
    [
        ([(80, 20), (70, 30)], True),
        ([(80, 20), (84, 16)], True),
        ([(80, 20), (86, 14)], False),  # the slowest computes 86 ms, and waits for nobody
        ([(8, 1.9), (8, 1.9)], False),
        ([(0, 100), (100, 10)], False),
    ],
)
def test_auto_decides_by_the_rank_that_waits_for_nobody_and_for_good(
    milliseconds: list[tuple[float, float]], is_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = Overlap.note

    def noting(overlap: Any, computing: float, exchanging: float) -> None:
        mine = milliseconds[overlap._transport.world.rank]
        note(overlap, mine[0] / 1e3, mine[1] / 1e3)

    monkeypatch.setattr(Overlap, "note", noting)

    def rank(transport: ThreadTransport) -> tuple[Any, list[Any]]:
        model = built(transport, "auto")
        assert model.overlap.is_on is None
        logits = [model.logits(share_of(transport.world.rank, 2)) for _ in range(3)]
        return model.overlap.document(), logits

    (first, _), (second, _) = ranks = run_ranks(2, rank)
    assert first == second
    assert first["is_on"] is is_on
    assert (first["why"] is None) is is_on
    for number, (_, logits) in enumerate(ranks):
        expected = build(small_spec()).logits(share_of(number, 2))
        assert all(np.array_equal(one, expected) for one in logits)


def test_a_layer_in_which_kernels_are_compiled_does_not_count() -> None:
    def rank(transport: ThreadTransport) -> float | None:
        overlap = Overlap("auto", transport=transport, layers=3)
        for computing, exchanging in ((9.0, 0.0), (3.0, 1.0), (3.0, 1.0)):
            assert overlap.is_on is None
            overlap.note(computing, exchanging)
        return overlap.share

    assert run_ranks(2, rank) == [0.25, 0.25]


def test_the_first_forward_tells_experts_and_exchange_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a clock that nothing moves but experts, 5 s, and each half of an exchange, 1 s."""
    now = [0.0]
    noted: list[tuple[float, float]] = []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(Overlap, "note", lambda self, *times: noted.append(times))

    def taking(seconds: float, call: Any) -> Any:
        def called(*inputs: Any) -> Any:
            now[0] += seconds
            return call(*inputs)

        return called

    def rank(transport: ThreadTransport) -> None:
        def wrap(name: str, spec: Spec, block: Block) -> Block:
            return taking(5, block) if name.endswith(".experts") else block

        model = built(transport, "auto", wrap=wrap)
        for exchange in model.exchanges.values():
            exchange.dispatch = taking(1, exchange.dispatch)  # type: ignore[method-assign]
            exchange.combine = taking(1, exchange.combine)  # type: ignore[method-assign]
        model.logits(share_of(0, 1))

    run_ranks(1, rank)
    assert noted == [(5, 2)] * 2


class Busy(ThreadTransport):
    """A transport of ranks that cannot do two things at a time."""

    def aside(self, purpose: str) -> Any:
        return None


@pytest.mark.parametrize(
    ("make", "more"),
    [(DeviceTransport, {"plan": "device"}), (Busy, {})],
    ids=["an exchange of a device", "a transport"],
)
def test_where_it_is_not_possible_auto_is_off_and_on_says_why(
    make: Any, more: dict[str, Any]
) -> None:
    def rank(transport: ThreadTransport, overlap: str) -> Overlap:
        return built(transport, overlap, backends={"device": DeviceBackend()}, **more).overlap

    why = "the exchange cannot work beside a computation"
    for overlap in run_ranks(2, partial(rank, overlap="auto"), make=make):
        assert overlap.is_on is False
        assert overlap.why == why
    with pytest.raises(Lfm2kitError, match=why):
        run_ranks(2, partial(rank, overlap="on"), make=make)


def test_a_process_alone_does_not_overlap() -> None:
    spec, create = small_spec(), creator({})
    placed = Placer(Plan.parse(PLAIN), create, JOINS, [PLAIN]).place(spec)
    ready = Builder(random_weights(spec), create)
    assert build_model(placed, ready, PLAIN, None, "auto").overlap.is_on is False
    with pytest.raises(Lfm2kitError, match="no tokens travel between ranks"):
        build_model(placed, ready, PLAIN, None, "on")
