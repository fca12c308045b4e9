"""Where a forward's time goes: on the host, and on a device whose replays call no blocks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lfm2kit import specs
from lfm2kit.backend import API_VERSION, BackendPlugin, Block
from lfm2kit.batch import Batch
from lfm2kit.building.loading import Setup, set_up
from lfm2kit.building.options import Options
from lfm2kit.building.plugins import InstalledBackend, installed_plugins
from lfm2kit.building.results import Checked
from lfm2kit.building.waits import Waits
from lfm2kit.measuring.bench import random_batch
from lfm2kit.profiling import forwards
from lfm2kit.profiling.figures import parts_of, totals
from lfm2kit.profiling.forwards import Profile, Prompt, profiled
from lfm2kit.profiling.ranks import gathered
from lfm2kit.profiling.trace_events import trace_events
from lfm2kit.ranks.joining import Alone
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.specs import Spec
from lfm2kit.state import Room
from lfm2kit.testing.host_block import host_block
from lfm2kit.weights import Weights
from tests.conformance.ahead import DrawsAhead
from tests.random_model import RANDOM

LONG, SHORT = 0.04, 0.002  # seconds
BATCH = random_batch(2, 5, 1024, seed=0)


@pytest.fixture(autouse=True)
def marks_may_cost_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow any cost: forwards of a small model on a busy machine do not show it."""
    monkeypatch.setattr(forwards, "MOST_OVERHEAD", np.inf)


def setup_of(backend: Any) -> Setup:
    plugins = installed_plugins()
    mine = BackendPlugin("mine", "a test's", lambda context: backend, API_VERSION)
    plugins.backends["mine"] = InstalledBackend(mine, "this test")
    return set_up(RANDOM, Options(backend="mine"), plugins=plugins)


def profile_of(setup: Setup, prompt: Prompt = Prompt(BATCH)) -> Profile:  # noqa: B008
    checked, waits = list[Checked](), list[Waits]()
    model = setup.build(checked=checked, waits=waits)
    return profiled(model, [*checked, *waits], prompt, repetitions=2)


class Sleeps(ReferenceBackend):
    """Its blocks of one kind take a while."""

    def __init__(self, kind: type[Spec]) -> None:
        self.kind = kind

    def build(self, spec: Spec, weights: Weights) -> Block:
        block = super().build(spec, weights)
        if not isinstance(spec, self.kind):
            return block

        def slow(*inputs: Any) -> Any:
            time.sleep(LONG)
            return block(*inputs)

        return slow


def test_the_kind_that_takes_longest_comes_first() -> None:
    setup = setup_of(Sleeps(specs.MLP))
    profile = profile_of(setup)
    parts = parts_of(setup, profile, BATCH)
    assert [part.name for part in parts[:3]] == [
        "embed_tokens", "layers.0.operator_norm", "layers.0.operator",
    ]  # fmt: skip
    found = list(totals(parts, None))
    seconds = [one.seconds for one in found]
    assert seconds == sorted(seconds, reverse=True)
    by_kind = {one.kind: one for one in found}
    assert by_kind.keys() >= {"norm", "conv", "attn", "router", "experts", "head"}
    slow = by_kind["mlp"]
    assert (slow.backend, slow.blocks) == ("mine", 2)
    assert slow.seconds >= 2 * LONG


class TellsParts(ReferenceBackend):
    """Builds layers whole, and tells when the operator and the feed-forward are done."""

    def why_unsupported(self, spec: Spec) -> str | None:
        return None if isinstance(spec, specs.Layer) else super().why_unsupported(spec)

    def state_bytes(self, spec: Any, room: Room) -> int:
        return super().state_bytes(getattr(spec, "operator", spec), room)

    def build(self, spec: Spec, weights: Weights) -> Block:
        if not isinstance(spec, specs.Layer):
            return super().build(spec, weights)
        return Told(host_block(ReferenceBackend(), spec, weights, is_guarded=False))


class Told:
    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.new_state = layer.new_state
        self.passed: Callable[[str], None] | None = None

    def tell_parts(self, passed: Callable[[str], None] | None) -> None:
        self.passed = passed

    def __call__(self, *inputs: Any) -> Any:
        result = self.layer(*inputs)
        if self.passed is not None:
            self.passed("operator")
            time.sleep(SHORT)
            self.passed("feed_forward")
        return result


def test_a_whole_layer_that_tells_its_parts_is_shown_by_them() -> None:
    setup = setup_of(TellsParts())
    parts = parts_of(setup, profile_of(setup), BATCH)
    of_layer = [part for part in parts if part.layer == 2]
    assert [(part.name, part.kind) for part in of_layer] == [
        ("layers.2.operator", "attn"),
        ("layers.2.feed_forward", "moe"),
    ]
    assert of_layer[1].seconds >= SHORT
    operator = next(part.spec for part in RANDOM.spec.layers[2].parts() if part.role == "operator")
    assert of_layer[0].work.flops == operator.work(BATCH).flops


def test_after_a_profile_parts_are_told_to_nobody() -> None:
    setup = setup_of(TellsParts())
    checked: list[Checked] = []
    model = setup.build(checked=checked)
    profiled(model, checked, Prompt(BATCH), repetitions=1)
    layers = [one._block for one in checked if isinstance(one.placed.spec, specs.Layer)]
    assert layers
    assert all(layer.passed is None for layer in layers)


def test_replays_are_measured_although_they_call_no_block() -> None:
    backend = DrawsAhead()
    setup = setup_of(backend)
    profile = profile_of(setup)
    first, second = profile.spans
    assert [span.name for span in first] == [span.name for span in second]
    assert {span.memory for span in first} == {backend.device.name}
    assert [s.seconds for s in first] != [s.seconds for s in second]
    assert all(span.seconds >= 0 for span in (*first, *second))


@pytest.mark.parametrize("backend", [ReferenceBackend(), DrawsAhead()])
def test_logits_with_marks_have_the_bits_of_those_without(backend: Any) -> None:
    checked: list[Checked] = []
    model = setup_of(backend).build(checked=checked)
    want = np.array(model.logits(BATCH))
    profiled(model, checked, Prompt(BATCH), repetitions=1)
    np.testing.assert_array_equal(model.logits(BATCH), want)


def test_a_step_goes_on_from_its_prompt() -> None:
    room = Room.of_sequences(2, 6)
    pages = np.arange(room.pages, dtype=np.int32).reshape(2, -1)
    before = Batch.of_sequences([[1, 2, 3, 4, 5], [6, 7, 8, 9, 1]], pages=pages)
    step = Batch.of_sequences([[3], [4]], starts=[5, 5], pages=pages)
    setup = setup_of(ReferenceBackend())
    profile = profile_of(setup, Prompt(step, before, room))
    assert len(profile.plain) == len(profile.marked) == 2


def test_marks_that_cost_too_much_go_into_one_layer_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Profile, "overhead", property(lambda self: 1.0 / self.groups))
    monkeypatch.setattr(forwards, "MOST_OVERHEAD", 0.5)
    setup = setup_of(ReferenceBackend())
    profile = profile_of(setup)
    assert profile.groups == 9  # 8 layers, and what is around them
    assert len(parts_of(setup, profile, BATCH)) == 42


def test_a_trace_has_each_block_of_the_last_forward_in_order() -> None:
    setup = setup_of(ReferenceBackend())
    profile = profile_of(setup)
    ranks = gathered(Alone(), profile, parts_of(setup, profile, BATCH), BATCH.sequences, None)
    rank, memory, *events = trace_events(ranks)["traceEvents"]
    assert [one["args"]["name"] for one in (rank, memory)] == ["rank 0", "host"]
    assert [event["name"] for event in events[:2]] == ["embed_tokens", "layers.0.operator_norm"]
    ends = [event["ts"] + event["dur"] for event in events]
    begins = [event["ts"] for event in events]
    assert all(end <= begin for end, begin in zip(ends, begins[1:], strict=False))
