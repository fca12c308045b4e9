"""Crossings: who makes them, when a forward with them is captured, and what surrounds it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from threading import Thread
from typing import Any

import numpy as np
import pytest

from lfm2kit import specs
from lfm2kit.backend import HOST, Batch, Block, Crossing, Memory, Spec, Weights
from lfm2kit.building.builder import Builder
from lfm2kit.building.results import checked
from lfm2kit.errors import Lfm2kitError
from lfm2kit.model import LFM2
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.state import Room
from tests.core.small import build, creator, random_weights, small_spec
from tests.core.test_model import SEQUENCES, Box, CapturingBackend

CHOICES = ("layers.2.feed_forward.router.choice", "layers.3.feed_forward.router.choice")


class Server:
    """Notes when it serves, and can fail as a block's thread does."""

    def __init__(self) -> None:
        self.is_serving = False
        self.forwards = 0
        self.failure: Lfm2kitError | None = None

    @contextmanager
    def serving(self) -> Iterator[None]:
        self.is_serving = True
        self.forwards += 1
        try:
            yield
        finally:
            self.is_serving = False
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure


class Crossed:
    def __init__(self, name: str, block: Block, server: Server) -> None:
        self.name = name
        self.block = block
        self.server = server
        self.calls = 0

    def __call__(self, *inputs: Any) -> Any:
        assert self.server.is_serving, f"{self.name} is called where nobody serves"
        self.calls += 1
        result = self.block(*(box.values for box in inputs))
        return tuple(map(Box, result)) if isinstance(result, tuple) else Box(result)


class CrossingBackend(CapturingBackend):
    """Chooses experts on the host, and crosses to there by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.server = Server()
        self.crossings: dict[str, Crossed] = {}

    def memory(self, spec: Spec) -> Memory:
        return HOST if isinstance(spec, specs.Choice) else super().memory(spec)

    def why_unsupported(self, spec: Spec) -> str | None:
        if any(isinstance(part.spec, specs.Choice) for part in spec.parts()):
            return "it builds a router's parts apart"
        return super().why_unsupported(spec)

    def build(self, spec: Spec, weights: Weights) -> Block:
        if isinstance(spec, specs.Choice):
            return self.reference.build(spec, weights)
        return super().build(spec, weights)

    def why_not_crossed(self, spec: Spec, memory: Memory, outer: Memory) -> str | None:
        is_known = isinstance(spec, specs.Choice | specs.Experts)
        return None if is_known else "only choices and experts"

    def crossing(
        self, name: str, spec: Spec, block: Block, memory: Memory, outer: Memory
    ) -> Crossing:
        self.crossings[name] = Crossed(name, block, self.server)
        return self.crossings[name]


@pytest.fixture
def expected() -> Any:
    return build(small_spec()).logits(Batch.of_sequences(SEQUENCES)).copy()


def crossing_model(plan: str = "crossing") -> tuple[LFM2, CrossingBackend]:
    backend = CrossingBackend()
    return build(small_spec(), plan, {"crossing": backend}), backend


def test_a_forward_with_crossings_is_captured(expected: Any) -> None:
    model, backend = crossing_model()
    for forms in (0, 1, 1):
        np.testing.assert_array_equal(model.logits(Batch.of_sequences(SEQUENCES)), expected)
        assert len(backend.forms) == forms
    assert {name: crossing.calls for name, crossing in backend.crossings.items()} == dict.fromkeys(
        CHOICES, 3
    )


def test_padding_rows_do_not_cross() -> None:
    """The host would compute them, and read experts for them."""

    class PaddedBackend(CapturingBackend):
        def takes_padding(self, spec: Spec) -> bool:
            return True

    class PaddedCrossingBackend(PaddedBackend, CrossingBackend):
        pass

    plain = build(small_spec(), "captured", {"captured": PaddedBackend()})
    crossing = build(small_spec(), "crossing", {"crossing": PaddedCrossingBackend()})
    assert plain.takes_padding
    assert not crossing.takes_padding


def test_the_server_serves_during_forwards_only() -> None:
    model, backend = crossing_model()
    assert (backend.server.forwards, backend.server.is_serving) == (0, False)
    for forwards in (1, 2):
        model.logits(Batch.of_sequences(SEQUENCES))
        assert (backend.server.forwards, backend.server.is_serving) == (forwards, False)


def test_running_keeps_the_forwards_of_other_threads_out() -> None:
    """Else one thread may hold the model and wait for its server, while another holds that."""
    model, _ = crossing_model()
    has_lock: list[bool] = []
    thread = Thread(target=lambda: has_lock.append(model._lock.acquire(blocking=False)))
    with model.running():
        thread.start()
        thread.join()
    assert has_lock == [False]


def test_a_failure_of_a_server_is_the_forwards_and_the_next_one_works(expected: Any) -> None:
    model, backend = crossing_model()
    backend.server.failure = Lfm2kitError("layers.2 failed")
    with pytest.raises(Lfm2kitError, match=r"layers\.2 failed"):
        model.logits(Batch.of_sequences(SEQUENCES))
    np.testing.assert_array_equal(model.logits(Batch.of_sequences(SEQUENCES)), expected)


def test_what_a_forward_with_a_failure_has_written_to_a_state_is_lost() -> None:
    """A crossing's failure is raised when its results, which mean nothing, have gone through."""
    model, backend = crossing_model()
    state = model.new_state(Room(1, 64))
    for step, failure in enumerate([None, None, Lfm2kitError("layers.2 failed")]):
        backend.server.failure = failure
        with nullcontext() if failure is None else pytest.raises(Lfm2kitError, match=r"layers\.2"):
            model.logits(Batch.of_sequences([[5]], starts=[step], pages=[[0]]), state)
    with pytest.raises(ValueError, match="page 0 was lost when a forward failed"):
        model.logits(Batch.of_sequences([[5]], starts=[3], pages=[[0]]), state)
    model.logits(Batch.of_sequences([[5]], starts=[0], pages=[[0]]), state)


@pytest.mark.parametrize(
    ("plan", "crosser", "copies"),
    [
        ("crossing,experts=reference", ("crossing", "crossing"), 4),  # another backend's block
        ("crossing,mlp=reference", ("crossing", None), 4),
        ("reference,choice=crossing", (), 0),
    ],
)
def test_the_plans_backends_are_asked_who_crosses(
    plan: str, crosser: tuple[str | None, ...], copies: int, expected: Any
) -> None:
    """Whoever has built the block.  Where nobody can, the seam waits and nothing is captured."""
    model, backend = crossing_model(plan)
    copied = [leaf for leaf in model.placed.leaves() if leaf.is_copied]
    assert model.placed.copies() == len(copied) == copies
    assert {leaf.crosser for leaf in copied} == set(crosser)
    reasons = {leaf.spec.kind: leaf.why_not_crossed for leaf in copied if leaf.crosser is None}
    assert reasons == ({"mlp": "crossing: only choices and experts"} if None in crosser else {})
    for _ in range(3):
        np.testing.assert_array_equal(model.logits(Batch.of_sequences(SEQUENCES)), expected)
    assert bool(backend.forms) == (plan == "crossing,experts=reference")


def test_a_block_built_alone_is_not_crossed() -> None:
    """Nobody serves around it: `bench` calls such blocks."""
    backend = CrossingBackend()
    model = build(small_spec(), "crossing", {"crossing": backend})
    before = dict(backend.crossings)
    assert model.servers == [backend.server]
    spec, create = small_spec(), creator({"crossing": backend})
    (placed,) = [p for p in model.placed.tree() if p.name == CHOICES[0]]
    block = Builder(random_weights(spec), create).build(placed)
    ids, weights = block(Box(np.ones((2, 5), np.float32)))
    assert ids.shape == weights.shape == (2, 3)
    assert backend.crossings == before


def test_a_checked_block_is_still_native() -> None:
    """The core's own check of results does not hide machine code."""
    model = build(small_spec())
    (placed,) = [p for p in model.placed.tree() if p.name == "layers.2.feed_forward.router"]

    class Native:
        def __call__(self, x: Any) -> Any: ...
        def native(self) -> str:
            return "machine code"

    assert checked(placed, Native()).native() == "machine code"  # type: ignore[attr-defined]
    assert not hasattr(checked(placed, lambda x: x), "native")


def test_the_reference_crosses_nothing() -> None:
    assert not hasattr(ReferenceBackend(), "why_not_crossed")
