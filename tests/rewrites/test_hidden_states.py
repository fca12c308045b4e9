"""Hidden states are what comes out of layers, whatever builds them, and watching changes no bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import lfm2kit
from lfm2kit import specs
from lfm2kit.backend import Batch
from lfm2kit.errors import Lfm2kitError
from lfm2kit.model import DecoderLayer
from lfm2kit.rewrites.hidden_states import HiddenStates
from lfm2kit.rewrites.trim import TRIM
from lfm2kit.state import Room
from tests.conformance.late import LateBackend
from tests.core.small import build, random_weights, small_spec
from tests.core.test_model import CapturingBackend, DeviceBackend, FusingBackend

SEQUENCES = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7]]
SPEC = small_spec()
WEIGHTS = random_weights(SPEC)
BACKENDS = {
    "reference": lambda: None,
    "device": DeviceBackend,
    "late": LateBackend,
    "whole": lambda: FusingBackend(specs.Layer, DecoderLayer),
    "capturing": CapturingBackend,
}


def every_row(sequences: list[list[int]]) -> Batch:
    batch = Batch.of_sequences(sequences)
    return replace(batch, logits_rows=np.arange(batch.tokens, dtype=np.int32))


def logits_of(hidden: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Return what the model's norm and head make of hidden states."""
    x = hidden.astype(np.float64)
    x /= np.sqrt(np.mean(x**2, axis=1, keepdims=True) + 1e-5)
    x *= WEIGHTS.float32("embedding_norm.weight")
    result: npt.NDArray[np.float64] = x @ WEIGHTS.float32("embed_tokens.weight").T
    return result


@pytest.mark.parametrize("name", BACKENDS)
def test_a_model_that_ends_at_a_layer_makes_its_logits_of_that_layers_states(name: str) -> None:
    backend: Any = BACKENDS[name]()
    backends = {} if backend is None else {name: backend}
    states, batch = HiddenStates([3, 0, 2]), every_row(SEQUENCES)
    model = build(SPEC, name, backends, rewrites=[states.rewrite()])
    model.logits(Batch.of_sequences([[7] * 40]))
    assert np.array_equal(model.logits(batch), build(SPEC).logits(batch))
    found = states.newest()
    assert [*found] == [0, 2, 3]
    for layer, hidden in found.items():
        assert (hidden.shape, hidden.dtype) == ((batch.tokens, 24), np.float32)
        ends_there = replace(SPEC, layers=SPEC.layers[: layer + 1])
        want = build(ends_there, weights=WEIGHTS).logits(batch)
        np.testing.assert_allclose(logits_of(hidden), want, rtol=1e-4, atol=1e-4)


def test_a_step_shows_the_states_of_its_own_tokens() -> None:
    states, ids = HiddenStates([1]), [3, 1, 4, 1, 5]
    model = build(SPEC, rewrites=[states.rewrite()])
    model.logits(every_row([ids]))
    whole = states.newest()[1]
    room = Room.of_sequences(1, 8)
    pages, state = np.zeros((1, 1), np.int32), model.new_state(room)
    for start, end in ((0, 3), (3, 4), (4, 5)):
        model.logits(Batch.of_sequences([ids[start:end]], starts=[start], pages=pages), state)
        np.testing.assert_allclose(states.newest()[1], whole[start:end], rtol=1e-5, atol=1e-6)


def test_a_forward_that_fails_leaves_the_states_of_the_one_before() -> None:
    calls = []

    def wrap(name: str, spec: specs.Spec, block: Any) -> Any:
        def failing(*inputs: Any) -> Any:
            calls.append(name)
            if len(calls) == 2:
                raise RuntimeError("the second forward fails here")
            return block(*inputs)

        return failing if name == "layers.2.feed_forward" else block

    states = HiddenStates([1, 3])
    model = build(SPEC, wrap=wrap, rewrites=[states.rewrite()])
    model.logits(every_row(SEQUENCES))
    before = states.newest()
    with pytest.raises(RuntimeError):
        model.logits(every_row([[7] * 9]))
    for layer, hidden in states.newest().items():
        assert np.array_equal(hidden, before[layer])


def test_a_model_of_a_folder_shows_them() -> None:
    states = lfm2kit.HiddenStates([5])
    model = lfm2kit.load_model("tiny", "reference", hidden_states=states)
    assert states.newest() == {}
    model.logits(Batch.of_sequences([[1, 2, 3]]))
    assert states.newest()[5].shape == (3, model.spec.embed_tokens.hidden_size)


@pytest.mark.parametrize("layer", [-1, 4])
def test_a_layer_that_is_not_there_is_named(layer: int) -> None:
    with pytest.raises(Lfm2kitError, match=f"after layer {layer}: the model has layers 0 to 3"):
        build(SPEC, rewrites=[HiddenStates([layer]).rewrite()])


def test_states_without_the_rows_that_are_trimmed_away_are_refused() -> None:
    with pytest.raises(Lfm2kitError, match="'hidden-states' needs all rows"):
        build(SPEC, rewrites=[TRIM, HiddenStates([1]).rewrite()])
