"""Joined blocks call their parts in the model's order and hand over what each returns."""

from __future__ import annotations

from typing import Any

import pytest

from lfm2kit import specs
from lfm2kit.model import DecoderLayer, Forward, RoutedExperts
from tests.core.small import small_spec


class Calls:
    """Makes blocks that note how they are called, and return what they are told to."""

    def __init__(self) -> None:
        self.made: list[tuple[Any, ...]] = []

    def block(self, name: str, result: Any) -> Any:
        def called(*inputs: Any) -> Any:
            self.made.append((name, *inputs))
            return result

        return called

    def operator(self, name: str, result: Any) -> Any:
        called = self.block(name, result)
        called.new_state = lambda *room: f"state of {name}"
        called.state_bytes = lambda *room: 7
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
    joined = layer(calls)
    assert joined.new_state(1, 2) == "state of operator"
    assert joined.state_bytes(1, 2) == 7


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
    joined = forward(calls)
    assert joined.new_state(1, 2) == [f"state of layers.{i}" for i in range(4)]
    assert joined.state_bytes(1, 2) == 4 * 7
