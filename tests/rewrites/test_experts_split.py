"""Experts in several blocks: any split, in any memory, gives the logits of one block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm2kit import specs
from lfm2kit.backend import HOST, Batch, Spec
from lfm2kit.building.placement import Placed
from lfm2kit.errors import Lfm2kitError
from lfm2kit.model import LFM2
from lfm2kit.rewrites import replaced
from lfm2kit.rewrites.experts_over_ranks import experts_over_ranks
from lfm2kit.rewrites.experts_split import ExpertsTogether, experts_split
from lfm2kit.rewrites.parted_experts import Places, SplitExperts, StreamedExperts
from lfm2kit.rewrites.trim import TRIM
from lfm2kit.testing import ThreadTransport, run_ranks
from tests.core.small import build, small_spec
from tests.rewrites.split_memories import Adding, backends

EXPERTS, LAYERS = range(5), (2, 3)  # of the small model
SEQUENCES = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7], [9, 3], [2]]
BATCH = Batch.of_sequences(SEQUENCES)
Split = Mapping[int, Places]

EACH = {2: Places((0, 3), (4,)), 3: Places((1,), (2, 0))}
PLANS = [
    "reference",
    "adding,host_experts=reference",
    "late,host_experts=reference",
    "device,host_experts=reference",  # its memory cannot add
    "reference,host_experts=adding,streamed_experts=late",
]


@pytest.fixture(scope="module")
def expected() -> npt.NDArray[np.float32]:
    return build(small_spec()).logits(BATCH)


def split_model(split: Split, plan: str = PLANS[1]) -> LFM2:
    """Return the small model, split; `plan` may have rules for parts that no layer has."""
    there = {
        f"{role}_experts"
        for places in split.values()
        for role in Places._fields
        if getattr(places, role)
    }
    absent = {"streamed_experts", "host_experts"} - there
    items = [item for item in plan.split(",") if item.partition("=")[0] not in absent]
    return build(small_spec(), ",".join(items), backends(), rewrites=[experts_split(split)])


@st.composite
def splits(draw: st.DrawFn) -> Split:
    """Draw a place for each expert of each layer; often all of a layer at one place."""
    some = st.sampled_from(["resident", "streamed", "host"])
    split = {}
    for layer in LAYERS:
        places = draw(
            st.one_of(st.lists(some, min_size=5, max_size=5), some.map(lambda p: [p] * 5))
        )
        order = draw(st.permutations(EXPERTS))
        split[layer] = Places(
            tuple(e for e in order if places[e] == "streamed"),
            tuple(e for e in order if places[e] == "host"),
        )
    return split


@settings(max_examples=40, deadline=None)
@given(splits(), st.sampled_from(PLANS))
def test_any_split_gives_the_logits_of_one_block(split: Split, plan: str) -> None:
    """But for rounding, because the parts' sums are added."""
    whole = build(small_spec()).logits(BATCH)
    np.testing.assert_allclose(split_model(split, plan).logits(BATCH), whole, rtol=0, atol=2e-5)


@settings(max_examples=10, deadline=None)
@given(splits(), st.sampled_from(PLANS[1:3]), st.permutations(range(len(SEQUENCES))))
def test_a_sample_has_the_same_bits_alone_in_a_batch_and_permuted(
    split: Split, plan: str, order: list[int]
) -> None:
    model = split_model(split, plan)
    together = model.logits(BATCH)
    for i, sequence in enumerate(SEQUENCES):
        assert np.array_equal(model.logits(Batch.of_sequences([sequence])), together[i : i + 1])
    permuted = model.logits(Batch.of_sequences([SEQUENCES[i] for i in order]))
    assert np.array_equal(permuted, together[order])


@pytest.mark.parametrize("plan", PLANS[:3])
def test_it_does_not_matter_which_memory_the_parts_are_in(plan: str) -> None:
    """The same blocks and the same additions: the same bits."""
    here = split_model(EACH, "reference").logits(BATCH)
    assert np.array_equal(split_model(EACH, plan).logits(BATCH), here)


def parts_of(model: LFM2, layer: int) -> dict[str, Placed]:
    """Return the parts of a layer's experts, by role."""
    name = f"layers.{layer}.feed_forward.experts"
    (placed,) = (one for one in model.placed.tree() if one.name == name)
    return dict(placed.parts)


def test_a_part_is_a_block_of_its_own_and_an_empty_one_is_none() -> None:
    parts = parts_of(split_model({2: Places((0, 3), (4,)), 3: Places((), (2, 1, 0, 3, 4))}), 2)
    assert list(parts) == ["resident", "streamed", "host"]
    assert {role: part.backend for role, part in parts.items()} == {
        "resident": "adding",
        "streamed": None,  # joined of the experts that the backend is asked for
        "host": "reference",
    }
    assert parts["host"].is_copied
    (resident, host) = (parts[role].spec for role in ("resident", "host"))
    assert isinstance(resident, specs.Experts)
    assert isinstance(host, specs.Experts)
    assert (resident.local_experts, host.local_experts) == ((1, 2), (4,))
    assert list(parts_of(split_model({2: Places((), (2, 1, 0, 3, 4))}), 2)) == ["host"]


def test_a_layer_that_is_not_split_stays_as_it_is() -> None:
    spec = small_spec()
    split = experts_split({2: Places(), 3: Places((0,))}).apply(spec)
    assert split.layers[:3] == spec.layers[:3]
    assert split.layers[3] != spec.layers[3]
    assert set(split.parameters()) == set(spec.parameters())


def test_streamed_experts_know_their_place_in_the_forward() -> None:
    spec = small_spec(num_dense_layers=0)
    places = {0: Places((4,)), 1: Places((), (1,)), 2: Places((1, 2, 0), (3,)), 3: Places((2, 3))}
    split = experts_split(places).apply(spec)
    streamed = [one for layer in split.layers for one in inside(layer, StreamedExperts)]
    assert [(s.position, s.slots, s.experts_per_slot) for s in streamed] == [
        (0, 4, 2),
        (1, 4, 2),
        (2, 4, 2),
    ]
    assert [s.portions for s in streamed] == [((4,),), ((1, 2), (0,)), ((2, 3),)]

    for asked, there in (((9, 1), (6, 1)), ((9, 7), (3, 3)), ((2, 2), (2, 2))):
        other = inside(experts_split(places, *asked).apply(spec), StreamedExperts)
        assert {(s.slots, s.experts_per_slot) for s in other} == {there}
    assert [s.experts.local_experts for s in streamed] == [(4,), (1, 2, 0), (2, 3)]


def inside(spec: Spec, kind: Any) -> list[Any]:
    found = [one for part in spec.parts() for one in inside(part.spec, kind)]
    return [spec, *found] if isinstance(spec, kind) else found


def test_a_backend_that_streams_builds_the_whole_spec(expected: Any) -> None:
    class Streaming(type(backends()["adding"])):  # type: ignore[misc]
        positions: ClassVar[list[int]] = []

        def why_unsupported(self, spec: Spec) -> str | None:
            known = isinstance(spec, StreamedExperts)
            return None if known else super().why_unsupported(spec)

        def build(self, spec: Spec, weights: Any) -> Any:
            if isinstance(spec, StreamedExperts):
                self.positions.append(spec.position)
                spec = spec.experts
            return super().build(spec, weights)

    plan, rewrites = "streaming,host_experts=reference", [experts_split(EACH)]
    model = build(small_spec(), plan, {"streaming": Streaming()}, rewrites=rewrites)
    np.testing.assert_allclose(model.logits(BATCH), expected, rtol=0, atol=2e-5)
    assert Streaming.positions == [0, 1]


def test_a_plan_addresses_the_parts_of_some_layers() -> None:
    plan = "adding,host_experts=reference,3.streamed_experts=late,2.experts=device"
    model = split_model(EACH, plan)
    assert {part.backend for part in parts_of(model, 2).values()} == {"device", None}
    third = parts_of(model, 3)
    assert [third[role].memory.name for role in ("resident", "host")] == [
        "elsewhere that adds",
        "host",
    ]
    (inner,) = (part for _, part in third["streamed"].parts)
    assert inner.backend == "late"
    for item in ("host_experts=reference", "2.streamed_experts=reference"):
        with pytest.raises(Lfm2kitError, match="fits no block"):
            build(small_spec(), f"reference,{item}")


def test_a_memory_that_cannot_add_leaves_that_to_the_host() -> None:
    model = split_model(EACH, "device")
    name = "layers.2.feed_forward.experts"
    (placed,) = (one for one in model.placed.tree() if one.name == name)
    assert placed.memory.name == HOST.name
    assert all(part.is_copied for part in placed.leaves())


def test_an_expert_has_one_place() -> None:
    with pytest.raises(Lfm2kitError, match="experts 0, 3 are streamed and the host's"):
        experts_split({2: Places((0, 1, 3), (3, 0))}).apply(small_spec())


def test_the_note_of_a_layer_says_where_its_experts_are() -> None:
    split = experts_split({2: Places((0, 3), (4,)), 3: Places((), (0, 1, 2, 3, 4))})
    notes = [one.note() for one in inside(split.apply(small_spec()), SplitExperts)]
    assert notes == ["experts 1-2 resident, 0, 3 streamed, 4 host", "experts 0-4 host"]


def test_experts_of_a_rank_are_split_too() -> None:
    """A rank's parts have those of its own experts that the split puts there."""

    def rank(transport: ThreadTransport) -> Any:
        over = experts_over_ranks(transport.world, transport)
        model = build(small_spec(), rewrites=[TRIM, over, experts_split(EACH)])
        return model.logits(BATCH)

    for logits in run_ranks(2, rank):
        expected = build(small_spec()).logits(BATCH)
        assert np.array_equal(logits, expected), "one expert a row: adding zeros rounds nothing"


class Part:
    """Notes what it is asked for, and returns an array of its own."""

    def __init__(self, role: str, value: float, events: list[str]) -> None:
        self.role, self.value, self.events = role, value, events

    def __call__(self, *inputs: Any) -> Any:
        self.events.append(self.role)
        return np.full(3, self.value, np.float32)


class Begun(Part):
    def begin(self, *inputs: Any) -> Any:
        self.events.append(f"{self.role} begins")
        return self

    def end(self) -> Any:
        self.events.append(f"{self.role} ends")
        return np.full(3, self.value, np.float32)


def test_the_host_begins_first_and_is_waited_for_last() -> None:
    events: list[str] = []

    class Noting:
        name = "noting"

        def add(self, left: Any, right: Any) -> Any:
            events.append(f"{left[0]:g} + {right[0]:g}")
            return left + right

    split = SplitExperts(moe().experts, EACH[2])
    parts = {
        "resident": Part("resident", 1, events),
        "streamed": Part("streamed", 2, events),
        "host": Begun("host", 4, events),
    }
    together = ExpertsTogether(Noting(), split, **parts)
    assert together(None, None, None).tolist() == [7, 7, 7]
    assert events == ["host begins", "resident", "streamed", "1 + 2", "host ends", "3 + 4"]


def test_a_host_that_cannot_begin_is_called() -> None:
    events: list[str] = []
    parts = {role: Part(role, value, events) for role, value in (("resident", 1), ("host", 4))}
    together = ExpertsTogether(HOST, SplitExperts(moe().experts, EACH[2]), **parts)
    assert together(None, None, None).tolist() == [5, 5, 5]


def test_a_part_alone_adds_nothing_up() -> None:
    for role in ("resident", "host"):
        together = ExpertsTogether(
            Adding(), SplitExperts(moe().experts, EACH[2]), **{role: Part(role, 1, [])}
        )
        assert together(None, None, None).tolist() == [1, 1, 1]


def moe() -> specs.SparseMoe:
    layer = small_spec().layers[2]
    assert isinstance(layer, specs.Layer)
    assert isinstance(layer.feed_forward, specs.SparseMoe)
    return layer.feed_forward


@pytest.mark.parametrize("fault", ["twice", "left out"])
def test_an_expert_in_two_parts_or_in_none_shows(fault: str, expected: Any) -> None:
    class Wrong(SplitExperts):
        def parts(self) -> Any:
            *others, host = super().parts()
            assert isinstance(host.spec, specs.Experts)
            ids = (0, 4) if fault == "twice" else ()
            return (*others, host._replace(spec=replace(host.spec, local_experts=ids)))

    def apply(model: specs.Model) -> specs.Model:
        split = rewrite.apply(model)
        return replaced_in(split, Wrong)

    rewrite = experts_split({2: EACH[2]})
    joins = {**rewrite.joins, Wrong: rewrite.joins[SplitExperts]}
    wrong = replace(rewrite, apply=apply, joins=joins)
    model = build(small_spec(), "reference", rewrites=[wrong])
    assert np.abs(model.logits(BATCH) - expected).max() > 1e-3


def replaced_in(model: specs.Model, kind: Any) -> specs.Model:
    def wrong(spec: Spec) -> Spec:
        return kind(spec.experts, spec.places) if isinstance(spec, SplitExperts) else spec

    changed: specs.Model = replaced(model, wrong)
    return changed
