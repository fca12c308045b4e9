"""Forwards in two halves on ranks that are threads: the bits of one process, and who decides."""

from __future__ import annotations

import threading
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
from lfm2kit.measuring import exchanged
from lfm2kit.model import JOINS, LFM2
from lfm2kit.overlapped import Overlap, halves, of_a_layer
from lfm2kit.rewrites import rewritten
from lfm2kit.rewrites.experts_over_ranks import experts_over_ranks
from lfm2kit.rewrites.trim import TRIM
from lfm2kit.state import Room
from lfm2kit.steps import Times, finished
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


def test_logits_are_in_the_order_in_which_they_are_asked_for() -> None:
    batch = Batch.of_sequences([[3, 1, 4], [1, 5], [9, 2, 6]])
    batch = batch.unchecked(logits_rows=np.array([7, 0, 4, 2, 5, 0], np.int32))

    def rank(transport: ThreadTransport) -> Any:
        return built(transport).logits(batch)

    for logits in run_ranks(2, rank):
        assert np.array_equal(logits, build(small_spec()).logits(batch))


def test_sequences_go_on_from_a_state_in_halves_too() -> None:
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


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([], ([], [])),
        ([5], ([], [5])),
        ([1, 9], ([1], [9])),
        ([9, 1], ([9], [1])),
        ([4, 4, 4, 4], ([4, 4], [4, 4])),
        ([1, 1, 1, 9], ([1, 1, 1], [9])),
    ],
)
def test_halves_are_of_whole_sequences_and_about_as_many_tokens(
    lengths: list[int], expected: tuple[list[int], list[int]]
) -> None:
    ids = iter(range(100))
    batch = Batch.of_sequences([[next(ids) for _ in range(n)] for n in lengths])
    parts = halves(batch)
    assert tuple(np.diff(part.cu_seqlens).tolist() for part in parts) == expected
    assert [i for part in parts for i in part.token_ids] == list(range(sum(lengths)))
    for part in parts:
        Batch(
            part.token_ids, part.positions, part.cu_seqlens, part.pages, part.logits_rows,
            part.max_seqlen,
        )  # fmt: skip


class Spied:
    """An exchange of one half that tells of its calls; each can be made to wait for an event."""

    def __init__(self, exchange: Any, said: str, events: list[str]) -> None:
        self.exchange, self.said, self.events = exchange, said, events
        self.waits: dict[str, threading.Event] = {}

    def dispatch(self, *inputs: Any) -> Any:
        self.tell("dispatch")
        return self.exchange.dispatch(*inputs)

    def combine(self, products: Any) -> Any:
        self.tell("combine")
        return self.exchange.combine(products)

    def tell(self, operation: str) -> None:
        if operation in self.waits:
            assert self.waits[operation].wait(60), "the other half does not compute meanwhile"
        self.events.append(f"{self.said} {operation}")


def spied(model: LFM2, events: list[str]) -> dict[str, list[Spied]]:
    """Replace the exchanges of a model by such as tell of their calls."""
    spies = {}
    for name, exchanges in model.exchanges.items():
        spies[name] = [Spied(e, f"{name} {half}", events) for half, e in enumerate(exchanges)]
        exchanges[:] = spies[name]  # type: ignore[index]
    return spies


def test_a_half_computes_while_the_others_tokens_travel() -> None:
    """The first half's tokens do not come before the second half has been computed so far."""

    def rank(transport: ThreadTransport) -> list[str]:
        events: list[str] = []
        twice = {"router": threading.Event(), "experts": threading.Event()}

        def wrap(name: str, spec: Spec, block: Block) -> Block:
            layer, _, kind = name.rpartition(".")
            if layer != "layers.3.feed_forward" or kind not in twice:
                return block

            def called(*inputs: Any) -> Any:
                events.append(kind)
                if events.count(kind) == 2:
                    twice[kind].set()
                return block(*inputs)

            return called

        model = built(transport, wrap=wrap)
        _, first, _ = spied(model, [])["layers.3.feed_forward"]
        first.waits = {"dispatch": twice["router"], "combine": twice["experts"]}
        model.logits(share_of(transport.world.rank, 2))
        return events

    assert run_ranks(2, rank) == [["router", "router", "experts", "experts"]] * 2


@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_exchange_in_the_same_order(size: int) -> None:
    def rank(transport: ThreadTransport) -> list[str]:
        events: list[str] = []
        model = built(transport)
        spied(model, events)
        model.logits(share_of(transport.world.rank, size))
        return events

    first, *others = run_ranks(size, rank)
    assert first == [
        f"layers.{layer}.feed_forward {half} {operation}"
        for layer in (2, 3)
        for operation in ("dispatch", "combine")
        for half in (1, 2)
    ]
    assert others == [first] * (size - 1)


def test_what_halves_send_is_counted_together() -> None:
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
        assert with_overlap["counts"]["messages"] == [2, 2]


def test_a_rank_that_fails_while_tokens_travel_ends_the_others_and_leaves_no_thread() -> None:
    def rank(transport: ThreadTransport) -> Any:
        def wrap(name: str, spec: Spec, block: Block) -> Block:
            def fails(*inputs: Any) -> Any:
                raise RuntimeError("no more memory")

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
    def rank(transport: ThreadTransport) -> tuple[Any, list[Any]]:
        model, mine = built(transport, "auto"), milliseconds[transport.world.rank]
        assert model.overlap.is_on is None
        times = Times([mine[0] / 2e3] * 2, [mine[1] / 2e3] * 2)
        monkeypatch.setattr(model.forward, "timed", lambda steps: (finished(steps), times))
        logits = [model.logits(share_of(transport.world.rank, 2)) for _ in range(3)]
        return model.overlap, logits

    (first, _), (second, _) = ranks = run_ranks(2, rank)
    assert first == second
    assert first.is_on is is_on
    assert (first.why is None) is is_on
    for number, (_, logits) in enumerate(ranks):
        expected = build(small_spec()).logits(share_of(number, 2))
        assert all(np.array_equal(one, expected) for one in logits)


def test_a_layer_in_which_kernels_are_compiled_does_not_count() -> None:
    times = Times([9.0, 9.0, 1.0, 2.0, 1.0, 2.0], [5.0, 5.0, 0.25, 0.5, 0.25, 0.5])
    assert of_a_layer(times) == (3.0, 0.75)


def wrapping(name: str, spec: Spec, block: Block) -> Block:
    return (lambda *inputs: block(*inputs)) if name == "layers.3" else block


class Busy(ThreadTransport):
    """A transport of ranks that cannot do two things at a time."""

    def aside(self) -> Any:
        return None


@pytest.mark.parametrize(
    ("make", "more", "why"),
    [
        (DeviceTransport, {"plan": "device"}, "tokens travel through a device's memory"),
        (ThreadTransport, {"plan": "device"}, "layers.2.feed_forward cannot be left while"),
        (ThreadTransport, {"wrap": wrapping}, "layers.3 cannot be left while tokens travel"),
        (Busy, {}, "the transport cannot work beside a computation"),
    ],
    ids=["an exchange of a device", "copies to the host", "a wrapper", "a transport"],
)
def test_where_it_is_not_possible_auto_is_off_and_on_says_why(
    make: Any, more: dict[str, Any], why: str
) -> None:
    def rank(transport: ThreadTransport, overlap: str) -> Overlap:
        return built(transport, overlap, backends={"device": DeviceBackend()}, **more).overlap

    for overlap in run_ranks(2, partial(rank, overlap="auto"), make=make):
        assert overlap.is_on is False
        assert why in str(overlap.why)
    with pytest.raises(Lfm2kitError, match=why):
        run_ranks(2, partial(rank, overlap="on"), make=make)


def test_a_process_alone_does_not_overlap() -> None:
    spec, create = small_spec(), creator({})
    placed = Placer(Plan.parse(PLAIN), create, JOINS, [PLAIN]).place(spec)
    ready = Builder(random_weights(spec), create)
    assert build_model(placed, ready, PLAIN, None, "auto").overlap.is_on is False
    with pytest.raises(Lfm2kitError, match="no tokens travel between ranks"):
        build_model(placed, ready, PLAIN, None, "on")
