"""The forward and its building: parts and wholes, memories, captures, state."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from lfm2kit import specs
from lfm2kit.backend import HOST, Batch, Block, Memory, Spec, Weights
from lfm2kit.batch import Form
from lfm2kit.errors import Lfm2kitError
from lfm2kit.model import JOINS, LFM2, Forward
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.state import Room
from tests.core.small import build, small_spec

SEQUENCES = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7]]


class Elsewhere:
    """A memory that NumPy cannot read: an array there is boxed."""

    def __init__(self, name: str = "elsewhere") -> None:
        self.name = name
        self.crossings = 0

    def from_host(self, array: Any) -> Any:
        assert isinstance(array, np.ndarray)
        self.crossings += 1
        return Box(array.copy())

    def to_host(self, array: Any) -> Any:
        assert isinstance(array, Box)
        self.crossings += 1
        return array.values.copy()


class Box:
    def __init__(self, values: Any) -> None:
        self.values = values
        self.shape = values.shape


class DeviceBackend:
    """A backend of the reference's blocks behind boxed arrays, as in any other memory."""

    def __init__(self) -> None:
        self.there = Elsewhere()
        self.reference = ReferenceBackend()

    def why_unsupported(self, spec: Spec) -> str | None:
        return self.reference.why_unsupported(spec)

    def memory(self, spec: Spec) -> Memory:
        return self.there

    def build(self, spec: Spec, weights: Weights) -> Block:
        return DeviceBlock(self.reference.build(spec, weights))

    def state_bytes(self, spec: Spec, room: Room) -> int:
        return self.reference.state_bytes(spec, room)


class DeviceBlock:
    def __init__(self, block: Any) -> None:
        self.block = block
        if hasattr(block, "new_state"):
            self.new_state = block.new_state

    def __call__(self, *inputs: Any) -> Any:
        result = self.block(*map(_unboxed, inputs))
        return tuple(map(Box, result)) if isinstance(result, tuple) else Box(result)


def _unboxed(value: Any) -> Any:
    if isinstance(value, Batch):
        assert value.memory.name.startswith("elsewhere"), "a batch came in the wrong memory"
        return value.on(HOST)
    assert not isinstance(value, np.ndarray) or value.dtype == np.float64, "host array"
    return value.values if isinstance(value, Box) else value


class FusingBackend(ReferenceBackend):
    """A backend that builds specs of one larger type whole, by joining the reference's parts."""

    def __init__(self, fused: type[Spec], make: Callable[..., Block]) -> None:
        self.fused = fused
        self.make = make
        self.made = 0

    def why_unsupported(self, spec: Spec) -> str | None:
        return None if isinstance(spec, self.fused) else super().why_unsupported(spec)

    def build(self, spec: Spec, weights: Weights) -> Block:
        if not isinstance(spec, self.fused):
            return super().build(spec, weights)
        self.made += 1
        return self._joined(spec, weights)

    def _joined(self, spec: Spec, weights: Weights) -> Block:
        if not spec.parts():
            return super().build(spec, weights)
        parts = {p.role: self._joined(p.spec, weights.scope(p.scope)) for p in spec.parts()}
        block: Block = JOINS[type(spec)](HOST).make(spec, **parts)
        return block


@pytest.fixture
def expected() -> Any:
    return build(small_spec()).logits(Batch.of_sequences(SEQUENCES)).copy()


def test_logits_are_those_of_each_sequences_last_token(expected: Any) -> None:
    model = build(small_spec())
    assert expected.shape == (3, 50)
    assert expected.dtype == np.float32
    for i, sequence in enumerate(SEQUENCES):
        np.testing.assert_array_equal(
            model.logits(Batch.of_sequences([sequence])), expected[i : i + 1]
        )


@pytest.mark.parametrize(
    ("fused", "count"), [(specs.SparseMoe, 2), (specs.Layer, 4), (specs.Model, 1)]
)
def test_the_largest_spec_that_a_backend_has_is_built_whole(
    fused: type[Spec], count: int, expected: Any
) -> None:
    backend = FusingBackend(fused, Forward)
    model = build(small_spec(), "fusing", {"fusing": backend})
    np.testing.assert_array_equal(model.logits(Batch.of_sequences(SEQUENCES)), expected)
    assert backend.made == count


def test_a_layer_shared_by_two_backends_is_made_of_its_parts(expected: Any) -> None:
    backend = FusingBackend(specs.Layer, Forward)
    model = build(small_spec(), "fusing,2.moe=reference", {"fusing": backend})
    np.testing.assert_array_equal(model.logits(Batch.of_sequences(SEQUENCES)), expected)
    assert backend.made == 3


@pytest.mark.parametrize(
    ("plan", "copies"),
    [
        ("device", 0),
        ("reference,moe=device", 4),
        ("device,router=reference", 2),
        ("device,1=reference", 4),
        ("reference,attn=device,embed=device,head=device,rows=device", 5),
    ],
)
def test_arrays_are_moved_at_the_seams_and_counted(plan: str, copies: int, expected: Any) -> None:
    model = build(small_spec(), plan, {"device": DeviceBackend()})
    assert model.placed.copies() == copies
    np.testing.assert_array_equal(model.logits(Batch.of_sequences(SEQUENCES)), expected)


class AroundBackend(DeviceBackend):
    """A backend that builds layers around their choice of experts, which is on the host."""

    CHOICE = "feed_forward.router.choice"

    def memory(self, spec: Spec) -> Memory:
        return HOST if isinstance(spec, specs.Choice) else super().memory(spec)

    def why_unsupported(self, spec: Spec) -> str | None:
        if isinstance(spec, specs.Router):
            return "it builds a router's parts apart"
        return (
            None
            if isinstance(spec, specs.Layer) and not _is_routed(spec)
            else super().why_unsupported(spec)
        )

    def build(self, spec: Spec, weights: Weights) -> Block:
        if isinstance(spec, specs.Choice):
            return self.reference.build(spec, weights)
        return self._joined(spec, weights, {}) if spec.parts() else super().build(spec, weights)

    def why_not_around(self, spec: Spec, parts: Sequence[str]) -> str | None:
        is_known = isinstance(spec, specs.Layer) and tuple(parts) == (self.CHOICE,)
        return None if is_known else "it builds a Layer around its choice"

    def build_around(self, spec: Spec, weights: Weights, parts: Mapping[str, Block]) -> Block:
        return self._joined(spec, weights, parts)

    def _joined(
        self, spec: Spec, weights: Weights, given: Mapping[str, Block], path: str = ""
    ) -> Block:
        if not spec.parts():
            return given.get(path) or self.build(spec, weights)
        parts = {
            p.role: self._joined(
                p.spec, weights.scope(p.scope), given, f"{path}.{p.role}".strip(".")
            )
            for p in spec.parts()
        }
        block: Block = JOINS[type(spec)](HOST).make(spec, **parts)
        return block


def _is_routed(spec: Spec) -> bool:
    return any(isinstance(leaf, specs.Choice) for leaf in specs.leaves(spec))


@pytest.mark.parametrize(
    ("plan", "chooses"),
    [
        ("around", "around"),
        ("around,choice=reference", "reference"),
        ("around,2.choice=reference", "reference"),
    ],
)
def test_a_layer_is_built_around_a_choice_that_lives_elsewhere(
    plan: str, chooses: str, expected: Any
) -> None:
    """Where the backend itself computes it in another memory, and where the plan gives it away."""
    model = build(small_spec(), plan, {"around": AroundBackend()})
    placed = dict(model.placed.parts)["layers.2"]
    assert (type(placed.spec), placed.backend, placed.memory.name) == (
        specs.Layer,
        "around",
        "elsewhere",
    )
    ((role, choice),) = placed.parts
    assert (role, choice.name) == (AroundBackend.CHOICE, f"layers.2.{AroundBackend.CHOICE}")
    assert (choice.scope, choice.backend) == ("layers.2.feed_forward", chooses)
    assert (choice.memory.name, choice.outer.name) == ("host", "elsewhere")
    assert [leaf.name for leaf in placed.leaves()] == ["layers.2", choice.name]
    assert model.placed.copies() == 2
    np.testing.assert_array_equal(model.logits(Batch.of_sequences(SEQUENCES)), expected)


@pytest.mark.parametrize(
    "item", ["router=reference", "scores=reference", "choice=reference,attn=reference"]
)
def test_a_layer_of_other_parts_is_joined_by_the_core(item: str, expected: Any) -> None:
    model = build(small_spec(), f"around,{item}", {"around": AroundBackend()})
    assert dict(model.placed.parts)["layers.3"].backend is None
    np.testing.assert_array_equal(model.logits(Batch.of_sequences(SEQUENCES)), expected)


def test_within_one_memory_only_ids_enter_and_logits_leave() -> None:
    backend = DeviceBackend()
    build(small_spec(), "device", {"device": backend}).logits(Batch.of_sequences(SEQUENCES))
    arrays_of_a_batch = 5
    assert backend.there.crossings == arrays_of_a_batch + 1


class Recorded:
    """A replay of a call; it counts the bytes that it holds in a list of one number."""

    def __init__(self, call: Callable[[Batch], Any], nbytes: int, held: list[int]) -> None:
        self.call = call
        self.nbytes = nbytes
        self.held = held
        held[0] += nbytes

    def __call__(self, batch: Batch) -> Any:
        assert self.nbytes, "a closed replay is called"
        return self.call(batch)

    def close(self) -> None:
        self.held[0] -= self.nbytes
        self.nbytes = 0


class CapturingBackend(DeviceBackend):
    """A backend that records which forms were captured; a replay is the forward, of 1000 bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.there = Elsewhere(f"elsewhere {id(self)}")  # where no other test's replays are kept
        self.forms: list[Form] = []
        self.held = [0]

    def capture(self, step: Callable[[Batch], Any], batch: Batch) -> Recorded:
        self.forms.append(batch.form)
        return Recorded(lambda batch: step(batch.on(self.there)), 1000, self.held)


def capturing_model() -> tuple[LFM2, CapturingBackend]:
    backend = CapturingBackend()
    return build(small_spec(), "capturing", {"capturing": backend}), backend


def test_a_forward_is_captured_when_its_form_comes_again(expected: Any) -> None:
    model, backend = capturing_model()
    for forms in (0, 1, 1, 1):
        np.testing.assert_array_equal(model.logits(Batch.of_sequences(SEQUENCES)), expected)
        assert len(backend.forms) == forms
    model.logits(Batch.of_sequences([[1, 2]]))
    model.logits(Batch.of_sequences([[3, 4]]))
    assert backend.forms == [Batch.of_sequences(s).form for s in (SEQUENCES, [[1, 2]])]


@pytest.mark.parametrize("replay", [None, 42, lambda batch: batch])
def test_what_is_captured_is_a_replay(replay: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = capturing_model()
    monkeypatch.setattr(CapturingBackend, "capture", lambda *_: replay)
    model.logits(Batch.of_sequences(SEQUENCES))
    says = "capture of CapturingBackend returned .*, but must return a Replay"
    with pytest.raises(Lfm2kitError, match=says):
        model.logits(Batch.of_sequences(SEQUENCES))


def test_a_replay_serves_other_lengths_of_the_same_form() -> None:
    model, backend = capturing_model()
    plain = build(small_spec())
    for lengths in ((4, 1, 3), (1, 4, 3), (3, 1, 4), (2, 2, 4)):
        batch = Batch.of_sequences([np.arange(n) for n in lengths])
        np.testing.assert_array_equal(model.logits(batch), plain.logits(batch))
    assert len(backend.forms) == 1


def test_each_state_has_replays_of_its_own_which_go_with_it() -> None:
    model, backend = capturing_model()
    states = [model.new_state(Room(1, 64)) for _ in range(2)]
    for start in range(4):
        for state in states:
            batch = Batch.of_sequences([[start]], starts=[start], pages=[[0]])
            model.logits(batch, state)
    assert (len(backend.forms), backend.held) == (2, [2000])
    del state, states[0]
    gc.collect()
    assert backend.held == [1000]
    del states, model
    gc.collect()
    assert backend.held == [0]


def test_a_forward_that_leaves_the_memory_is_not_captured() -> None:
    backend = CapturingBackend()
    model = build(small_spec(), "capturing,router=reference", {"capturing": backend})
    model.logits(Batch.of_sequences(SEQUENCES))
    assert backend.forms == []


@pytest.mark.parametrize("plan", ["reference", "device", "reference,operator=device"])
def test_chunks_with_state_give_what_one_forward_gives(plan: str, expected: Any) -> None:
    model = build(small_spec(), plan, {"device": DeviceBackend()})
    state = model.new_state(Room(5, 64))
    pages, seen, logits = [[4], [0], [2]], [0, 0, 0], np.empty_like(expected)
    while any(n < len(s) for n, s in zip(seen, SEQUENCES, strict=True)):
        going = [i for i, s in enumerate(SEQUENCES) if seen[i] < len(s)]
        chunks = [SEQUENCES[i][seen[i] : seen[i] + 2] for i in going]
        batch = Batch.of_sequences(
            chunks, starts=[seen[i] for i in going], pages=[pages[i] for i in going]
        )
        logits[going] = model.logits(batch, state)
        for i, chunk in zip(going, chunks, strict=True):
            seen[i] += len(chunk)
    np.testing.assert_allclose(logits, expected, atol=1e-6)


def test_a_wrapper_sees_every_block_and_keeps_its_state(expected: Any) -> None:
    names: list[str] = []

    def wrap(name: str, spec: Spec, block: Block) -> Block:
        return lambda *inputs: (names.append(name), block(*inputs))[1]

    model = build(small_spec(), wrap=wrap)
    np.testing.assert_array_equal(model.logits(Batch.of_sequences(SEQUENCES)), expected)
    assert {"embed_tokens", "layers.2.feed_forward.router", "layers.3", "lm_head"} <= set(names)
    batch = Batch.of_sequences(SEQUENCES, pages=[[0], [1], [2]])
    state = model.new_state(Room(3, 64))
    np.testing.assert_allclose(model.logits(batch, state), expected, 1e-5)


def test_a_missing_block_says_who_has_it() -> None:
    class Nothing(ReferenceBackend):
        def why_unsupported(self, spec: Spec) -> str | None:
            return "it has none"

    says = r"scores of layers 2-3, choice of layers 2-3, .* \(it has none\); reference can build th"
    with pytest.raises(Lfm2kitError, match=says):
        build(small_spec(), "reference,moe=nothing", {"nothing": Nothing()})
    says = r"layers\.2\.feed_forward\.router\.scores: backend 'nothing' has no Scores block"
    with pytest.raises(Lfm2kitError, match=says):
        build(small_spec(), "reference,2.scores=nothing", {"nothing": Nothing()})


@pytest.mark.parametrize("token", [-1, 50])
def test_an_id_outside_the_vocabulary_never_reaches_a_block(token: int) -> None:
    says = f"token id {token} in row 3, which is of sequence 1, lies outside the vocabulary of 50"
    with pytest.raises(ValueError, match=says):
        build(small_spec()).logits(Batch.of_sequences([[1, 2], [3, token], [token]]))


def test_a_batch_that_its_state_refuses_never_reaches_a_block() -> None:
    names: list[str] = []
    model = build(small_spec(), wrap=lambda name, spec, block: (names.append(name), block)[1])
    state, names = model.new_state(Room(3, 64)), []
    with pytest.raises(ValueError, match="sequence 0 names page 3, but the state has 3 pages"):
        model.logits(Batch.of_sequences([[1]], pages=[[3]]), state)
    assert names == []


def test_pages_of_a_forward_that_failed_hold_no_sequence() -> None:
    failing = False

    def wrap(name: str, spec: Spec, block: Block) -> Block:
        def called(*inputs: Any) -> Any:
            if failing and name == "layers.1.operator":
                raise RuntimeError
            return block(*inputs)

        return called

    model = build(small_spec(), wrap=wrap)
    state = model.new_state(Room(2, 64))
    model.logits(Batch.of_sequences([[1, 2, 3], [4]], pages=[[0], [1]]), state)
    failing = True
    with pytest.raises(RuntimeError):
        model.logits(Batch.of_sequences([[5]], starts=[3], pages=[[0]]), state)
    failing = False
    with pytest.raises(
        ValueError, match="after 3 tokens, but page 0 was lost when a forward failed"
    ):
        model.logits(Batch.of_sequences([[5]], starts=[3], pages=[[0]]), state)
    model.logits(Batch.of_sequences([[5]], starts=[1], pages=[[1]]), state)
    model.logits(Batch.of_sequences([[5]], pages=[[0]]), state)


class Interrupting(CapturingBackend):
    """A backend that ends a forward as Ctrl-C does, once it has written its state."""

    is_armed = False

    def build(self, spec: Spec, weights: Weights) -> Block:
        block = super().build(spec, weights)
        return self._interrupted(block) if isinstance(spec, specs.LMHead) else block

    def _interrupted(self, block: Block) -> Block:
        def call(x: Any) -> Any:
            if self.is_armed:
                raise KeyboardInterrupt
            return block(x)

        return call


@pytest.mark.parametrize("is_replayed", [False, True])
def test_an_interrupted_forward_loses_its_pages_and_nothing_else(is_replayed: bool) -> None:
    backend = Interrupting()
    model = build(small_spec(), "interrupting", {"interrupting": backend})
    state = model.new_state(Room(2, 64))
    model.logits(Batch.of_sequences([[0, 1], [0, 1]], pages=[[0], [1]]), state)

    def step(position: int, page: int) -> Any:
        batch = Batch.of_sequences([[position]], starts=[position], pages=[[page]])
        return model.logits(batch, state)

    position = 2
    while is_replayed and position < 4:
        step(position, 1)
        position += 1
    assert len(backend.forms) == is_replayed
    backend.is_armed = True
    with pytest.raises(KeyboardInterrupt):
        step(2, 0)
    backend.is_armed = False
    for again in (2, 3):
        with pytest.raises(ValueError, match="page 0 was lost when a forward failed"):
            step(again, 0)
    with ThreadPoolExecutor(1) as thread:  # the lock is free
        other = thread.submit(step, position, 1).result(timeout=60)
    plain = build(small_spec())
    want = plain.logits(Batch.of_sequences([np.arange(position + 1)]))
    np.testing.assert_allclose(other, want, atol=1e-6)
    np.testing.assert_allclose(step(0, 0), plain.logits(Batch.of_sequences([[0]])), atol=1e-6)


@pytest.mark.parametrize("plan", ["reference", "capturing"])
def test_without_a_state_sequences_are_whole(plan: str) -> None:
    model = build(small_spec(), plan, {"capturing": CapturingBackend()})
    with pytest.raises(ValueError, match="sequence 1 starts at position 1, but there is no state"):
        model.logits(Batch.of_sequences([[1, 2], [3]], starts=[0, 1]))


def test_a_state_of_another_model_or_of_fewer_layers_is_refused() -> None:
    model, twin = build(small_spec()), build(small_spec())
    batch = Batch.of_sequences([[1]], pages=[[0]])
    with pytest.raises(ValueError, match="the state belongs to another model"):
        model.logits(batch, twin.new_state(Room(1)))
    state = model.new_state(Room(1))
    state.layers.pop()
    with pytest.raises(ValueError, match="the state has 3 layers, the model 4"):
        model.logits(batch, state)


def test_a_copy_of_a_state_with_another_room_is_refused() -> None:
    """Blocks index memory by it: cpu_simd would write beyond what the layers hold."""
    model = build(small_spec())
    state, larger = model.new_state(Room(1)), model.new_state(Room(9))
    changes: tuple[dict[str, Any], ...] = ({"room": Room(9)}, {"layers": larger.layers}, {})
    for change in changes:
        with pytest.raises(ValueError, match="or is a copy: give what new_state returned"):
            model.logits(
                Batch.of_sequences([[1]], pages=[[0]]), dataclasses.replace(state, **change)
            )


def test_a_batch_of_no_sequences_gives_no_logits() -> None:
    assert build(small_spec()).logits(Batch.of_sequences([])).shape == (0, 50)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda model: model.logits([[1, 2]]), r"not \[\[1, 2\]\]; .* logits\(Batch.of_sequences"),
        (lambda model: model.logits(np.arange(3)), r"takes a lfm2kit.Batch, not array"),
        (lambda model: model.new_state(4), r"not 4; .* new_state\(Room.of_sequences\(16, 4096\)"),
        (
            lambda model: model.logits(Batch.of_sequences([[1]], pages=[[0]]), Room(1)),
            r"a state is what new_state\(room\) returns, not Room",
        ),
    ],
)
def test_an_argument_of_another_type_is_an_error_that_says_what_to_type(
    call: Callable[[LFM2], Any], says: str
) -> None:
    with pytest.raises(TypeError, match=says) as error:
        call(build(small_spec()))
    assert "\n" not in str(error.value)


def test_a_model_and_a_state_are_shown_in_one_short_line() -> None:
    model = build(small_spec(), "reference,moe=device", {"device": DeviceBackend()})
    assert repr(model) == "<LFM2 of 4 layers, vocabulary of 50, on device, reference>"
    state = model.new_state(Room(3, 64))
    assert repr(state) == "<ModelState of 4 layers, 3 pages of 64 tokens>"


def test_a_wrapper_around_the_whole_model_may_survive_capture(expected: Any) -> None:
    backend = CapturingBackend()
    model = build(
        small_spec(),
        "capturing",
        {"capturing": backend},
        wrap=lambda name, spec, block: block if name else lambda *inputs: block(*inputs),
    )
    for _ in range(3):
        np.testing.assert_array_equal(model.logits(Batch.of_sequences(SEQUENCES)), expected)
    assert len(backend.forms) == 1


def test_models_that_share_a_batch_replay_what_they_derive_themselves() -> None:
    """Two models derive other rows of one batch, in another order."""

    def rows(which: int) -> Any:
        def make(host: Batch) -> Batch:
            return host.unchecked(logits_rows=host.logits_rows[which : which + 1])

        return make

    def deriving(order: tuple[int, ...]) -> Any:
        def wrap(name: str, spec: Spec, block: Block) -> Block:
            def derived(hidden: Any, delta: Any, batch: Batch) -> Any:
                chosen = [batch.derived(("row", i), rows(i)) for i in order]
                return block(hidden, delta, chosen[0])

            return derived if name == "last_rows" else block

        backend = CapturingBackend()
        return build(small_spec(), "capturing", {"capturing": backend}, wrap=wrap)

    first, second = deriving((0, 1)), deriving((1, 0))
    for _ in range(4):
        batch = Batch.of_sequences(SEQUENCES)
        want = build(small_spec()).logits(batch)
        np.testing.assert_array_equal(first.logits(batch), want[:1])
        np.testing.assert_array_equal(second.logits(batch), want[1:2])
        np.testing.assert_array_equal(first.logits(batch), want[:1])
