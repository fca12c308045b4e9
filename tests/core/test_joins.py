"""Joined blocks call their parts in the model's order and pass on what each returns.

A join works where it says, its parts get arrays of that memory, and it says if it can be captured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest

from lfm2kit import specs
from lfm2kit.backend import HOST, Batch, Block, Memory, Spec
from lfm2kit.building.joins import Join
from lfm2kit.model import DecoderLayer, Forward, RoutedByScores, RoutedExperts
from lfm2kit.rewrites import Rewrite, replaced
from lfm2kit.specs import MLP, Part
from tests.core.small import build, small_spec
from tests.core.test_model import Box, DeviceBackend, Recorded

BATCH = Batch.of_sequences([[3, 1, 4, 1, 5], [9]])


@dataclass(frozen=True, slots=True)
class Seen(Spec):
    """A spec (x) -> delta, as the MLP, whose block notes the type of its arrays."""

    mlp: MLP
    kind: ClassVar[str] = "mlp"

    def parts(self) -> tuple[Part, ...]:
        return (Part("inner", "", self.mlp),)


class Watching:
    """A maker of blocks that note the types of the arrays that they take and their part gives."""

    def __init__(self) -> None:
        self.types: set[type] = set()
        self.surroundings: list[str] = []

    def make(self, spec: Seen, inner: Block) -> Block:
        def block(x: Any) -> Any:
            delta = inner(x)
            self.types |= {type(x), type(delta)}
            return delta

        return block

    def rewrite(self, memory: Memory | None = None, *, is_capturable: bool = True) -> Rewrite:
        """Return a rewrite whose blocks work in `memory`, or where their surroundings do."""

        def join(surroundings: Memory) -> Join:
            self.surroundings.append(surroundings.name)
            return Join(self.make, memory or surroundings, is_capturable)

        def seen(spec: Spec) -> Spec:
            return Seen(spec) if isinstance(spec, MLP) else spec

        return Rewrite("seen", "", lambda model: replaced(model, seen), {Seen: join})


@pytest.mark.parametrize(
    ("plan", "memory", "types", "copies"),
    [
        ("device", None, {Box}, 0),
        ("device", HOST, {np.ndarray}, 4),  # two layers: around the join, and around its part
        ("device,mlp=reference", None, {Box}, 2),
        ("device,mlp=reference", HOST, {np.ndarray}, 2),
        ("reference,mlp=device", None, {np.ndarray}, 2),
    ],
)
def test_a_join_sees_arrays_of_its_memory_wherever_its_parts_and_surroundings_are(
    plan: str, memory: Memory | None, types: set[type], copies: int
) -> None:
    watching, backends = Watching(), {"device": DeviceBackend()}
    model = build(small_spec(), plan, backends, rewrites=[watching.rewrite(memory)])
    assert model.placed.copies() == copies
    assert np.array_equal(model.logits(BATCH), build(small_spec()).logits(BATCH))
    assert watching.types == types
    home = "elsewhere" if plan.startswith("device") else "host"
    assert watching.surroundings == [home, home]


class Capturing(DeviceBackend):
    """A backend that counts its captures; a replay is the forward itself."""

    captures = 0

    def capture(self, step: Callable[[Batch], Any], batch: Batch) -> Recorded:
        self.captures += 1
        return Recorded(lambda batch: step(batch.on(self.there)), 1, [0])


def test_a_join_in_the_surrounding_memory_can_be_captured_unless_it_says_no() -> None:
    for is_capturable in (True, False):
        backend, watching = Capturing(), Watching()
        rewrites = [watching.rewrite(is_capturable=is_capturable)]
        model = build(small_spec(), "device", {"device": backend}, rewrites=rewrites)
        assert model.placed.is_capturable is is_capturable
        for _ in range(3):
            model.logits(BATCH)
        assert backend.captures == is_capturable


def test_a_backend_that_knows_the_spec_builds_it_and_no_join_is_asked_for() -> None:
    class Knowing(DeviceBackend):
        def why_unsupported(self, spec: Spec) -> str | None:
            return None if isinstance(spec, Seen) else super().why_unsupported(spec)

        def build(self, spec: Spec, weights: Any) -> Block:
            return super().build(spec.mlp if isinstance(spec, Seen) else spec, weights)

    watching = Watching()
    model = build(small_spec(), "knowing", {"knowing": Knowing()}, rewrites=[watching.rewrite()])
    assert watching.surroundings == []
    assert np.array_equal(model.logits(BATCH), build(small_spec()).logits(BATCH))


def test_a_tree_has_the_blocks_that_are_joined_and_those_that_are_built() -> None:
    placed = build(small_spec(), rewrites=[Watching().rewrite()]).placed
    names = [one.name for one in placed.tree()]
    assert names[:2] == ["", "embed_tokens"]
    assert {"layers.0", "layers.0.feed_forward", "layers.0.feed_forward.inner"} <= set(names)
    assert [one for one in placed.tree() if one.backend] == list(placed.leaves())


class Calls:
    """A maker of blocks that note how they are called, and return what they are told to."""

    def __init__(self) -> None:
        self.made: list[tuple[Any, ...]] = []

    def block(self, name: str, result: Any) -> Any:
        def called(*inputs: Any) -> Any:
            self.made.append((name, *inputs))
            return result

        return called

    def operator(self, name: str, result: Any) -> Any:
        called = self.block(name, result)
        called.new_state = lambda room: f"state of {name} for {room}"
        return called


@pytest.fixture
def calls() -> Calls:
    return Calls()


def layer(calls: Calls) -> DecoderLayer:
    return DecoderLayer(
        small_spec().layers[0],
        operator_norm=calls.block("operator_norm", ("hidden 1", "x 1")),
        operator=calls.operator("operator", "delta 1"),
        ffn_norm=calls.block("ffn_norm", ("hidden 2", "x 2")),
        feed_forward=calls.block("feed_forward", "delta 2"),
    )


@pytest.mark.parametrize("delta", ["delta", None])
def test_a_layer_norms_before_its_operator_and_before_its_feed_forward(
    calls: Calls, delta: Any
) -> None:
    assert layer(calls)("hidden", delta, "batch", "state") == ("hidden 2", "delta 2")
    assert calls.made == [
        ("operator_norm", "hidden", delta),
        ("operator", "x 1", "batch", "state"),
        ("ffn_norm", "hidden 1", "delta 1"),
        ("feed_forward", "x 2"),
    ]


def test_a_layers_state_is_its_operators(calls: Calls) -> None:
    assert layer(calls).new_state("room") == "state of operator for room"


def test_experts_get_what_the_router_chose(calls: Calls) -> None:
    spec = small_spec().layers[-1].feed_forward
    assert isinstance(spec, specs.SparseMoe)
    moe = RoutedExperts(
        spec,
        router=calls.block("router", ("ids", "weights")),
        experts=calls.block("experts", "delta"),
    )
    assert moe("x") == "delta"
    assert calls.made == [("router", "x"), ("experts", "x", "ids", "weights")]


def test_a_choice_gets_the_scores(calls: Calls) -> None:
    moe = small_spec().layers[-1].feed_forward
    assert isinstance(moe, specs.SparseMoe)
    router = RoutedByScores(
        moe.router,
        scores=calls.block("scores", "scores of x"),
        choice=calls.block("choice", ("ids", "weights")),
    )
    assert router("x") == ("ids", "weights")
    assert calls.made == [("scores", "x"), ("choice", "scores of x")]


def forward(calls: Calls) -> Forward:
    spec = small_spec()
    layers = {
        f"layers.{i}": calls.operator(f"layers.{i}", (f"hidden {i}", f"delta {i}"))
        for i in range(len(spec.layers))
    }
    return Forward(
        spec,
        embed_tokens=calls.block("embed_tokens", "hidden"),
        **layers,
        last_rows=calls.block("last_rows", ("last hidden", "last delta")),
        embedding_norm=calls.block("embedding_norm", ("sum", "x")),
        lm_head=calls.block("lm_head", "logits"),
    )


def test_a_forward_hands_each_layer_its_own_state(calls: Calls) -> None:
    assert forward(calls)("batch", ["s0", "s1", "s2", "s3"]) == "logits"
    assert calls.made == [
        ("embed_tokens", "batch"),
        ("layers.0", "hidden", None, "batch", "s0"),
        ("layers.1", "hidden 0", "delta 0", "batch", "s1"),
        ("layers.2", "hidden 1", "delta 1", "batch", "s2"),
        ("layers.3", "hidden 2", "delta 2", "batch", "s3"),
        ("last_rows", "hidden 3", "delta 3", "batch"),
        ("embedding_norm", "last hidden", "last delta"),
        ("lm_head", "x"),
    ]


def test_without_a_state_every_layer_gets_none(calls: Calls) -> None:
    forward(calls)("batch")
    assert [call[-1] for call in calls.made if call[0].startswith("layers")] == [None] * 4


def test_a_forwards_state_is_a_list_of_its_layers(calls: Calls) -> None:
    states = [f"state of layers.{i} for room" for i in range(4)]
    assert forward(calls).new_state("room") == states
