"""Rewrites in general: which are applied, in which order, and what a plugin can bring."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest

import lfm2kit
from lfm2kit import specs
from lfm2kit.batch import Batch
from lfm2kit.building.loading import Setup, set_up
from lfm2kit.building.options import Options
from lfm2kit.building.placement import Placer
from lfm2kit.building.plan import Plan
from lfm2kit.building.plugins import Plugins, installed_plugins
from lfm2kit.errors import Lfm2kitError
from lfm2kit.model import JOINS
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.rewrites import Join, Rewrite, chosen, replaced
from lfm2kit.rewrites.trim import TRIM
from lfm2kit.specs import MLP, Part, Spec
from lfm2kit.state import Room
from lfm2kit.transport import Transport, World
from tests.core.small import build, small_spec
from tests.random_model import RANDOM

CORE = Path(lfm2kit.__file__).parent
SEQUENCES = Batch.of_sequences([[3, 1, 4], [1, 5]])


@dataclass(frozen=True, slots=True)
class Halves(Spec):
    """A spec (x) -> delta, as the MLP, computed for half of the rows and then for the others."""

    mlp: MLP
    kind: ClassVar[str] = "mlp"

    def parts(self) -> tuple[Part, ...]:
        return (Part("mlp", "", self.mlp),)

    def note(self) -> str:
        return "in two halves"


class HalvesBlock:
    def __init__(self, spec: Halves, mlp: Any) -> None:
        self.mlp = mlp

    def __call__(self, x: Any) -> Any:
        middle, delta = len(x) // 2, np.empty_like(x)
        delta[:middle] = self.mlp(x[:middle])
        delta[middle:] = self.mlp(x[middle:])
        return delta


def in_halves(spec: Spec) -> Spec:
    return Halves(spec) if isinstance(spec, MLP) else spec


HALVES = Rewrite(
    "halves",
    "Compute dense feed-forwards in two halves.",
    lambda model: replaced(model, in_halves),
    {Halves: partial(Join, HalvesBlock)},
)


@lfm2kit.hookimpl
def lfm2kit_rewrites() -> Iterator[Rewrite]:
    yield HALVES


def plugins_of(monkeypatch: pytest.MonkeyPatch, *hooks: Any) -> Plugins:
    """Return the plugins `extra_0`, `extra_1`, ... with one hook each, beside the reference."""
    entries = [one.entry for one in installed_plugins().loaded if one.name == "reference"]
    for i, hook in enumerate(hooks):
        module = ModuleType(f"extra_{i}")
        module.lfm2kit_rewrites = hook  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        entries.append(EntryPoint(module.__name__, module.__name__, "lfm2kit"))
    return Plugins(entries)


def tiny(plugins: Plugins, *rewrites: str, **options: Any) -> Setup:
    asked = Options(backend="reference", rewrites=rewrites)
    return set_up(RANDOM, asked, plugins=plugins, **options)


def test_a_plugins_rewrite_is_chosen_by_name_and_keeps_the_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plugins = plugins_of(monkeypatch, lfm2kit_rewrites)
    setup = tiny(plugins, "halves")
    assert [rewrite.name for rewrite in setup.rewrites] == ["halves"]
    halves = [p.name for p in setup.placed.tree() if isinstance(p.spec, Halves)]
    assert halves == ["layers.0.feed_forward", "layers.1.feed_forward"]
    assert np.array_equal(setup.build().logits(SEQUENCES), tiny(plugins).build().logits(SEQUENCES))


@dataclass(frozen=True, slots=True)
class Around(Spec):
    """(hidden, delta, batch, state) -> (hidden, delta), as the layer that it holds."""

    layer: Spec
    kind: ClassVar[str] = "layer"
    has_state: ClassVar[bool] = True

    def parts(self) -> tuple[Part, ...]:
        return (Part("layer", "", self.layer),)


@dataclass(frozen=True, slots=True)
class Held(Around):
    """The same, of a kind of its own."""

    kind: ClassVar[str] = "held"


def around_layers(model: specs.Model) -> specs.Model:
    first, *others = model.layers
    return replace(model, layers=(Around(Held(first)), *map(Held, others)))


AROUND = Rewrite(
    "around",
    "Put each layer into another spec.",
    around_layers,
    dict.fromkeys((Around, Held), partial(Join, lambda spec, layer: layer)),
)


def test_a_layer_inside_a_rewrites_spec_has_the_number_of_its_place_in_the_model() -> None:
    plan = Plan.parse("first,1-2=second")
    placer = Placer(plan, lambda name: ReferenceBackend(), {**JOINS, **AROUND.joins})
    leaves = list(placer.place(around_layers(small_spec())).leaves())
    inside = {(one.name.split(".")[1], one.backend) for one in leaves if "layers" in one.name}
    assert inside == {("0", "first"), ("1", "second"), ("2", "second"), ("3", "first")}
    assert {one.name.partition(".operator")[0] for one in leaves} >= {
        "layers.0.layer.layer",
        "layers.1.layer",
    }


def test_a_spec_without_a_join_whose_parts_the_plan_gives_to_two_backends_is_named() -> None:
    placer = Placer(Plan.parse("a,conv=b"), lambda name: ReferenceBackend(), JOINS)
    with pytest.raises(
        Lfm2kitError, match=r"layers\.0: the plan gives parts of this Around to 'a' "
    ):
        placer.place(around_layers(small_spec()))


def test_a_model_of_layers_inside_a_rewrites_specs_gives_the_same_bits_and_has_a_state() -> None:
    plain, around = build(small_spec()), build(small_spec(), rewrites=(AROUND,))
    assert np.array_equal(around.logits(SEQUENCES), plain.logits(SEQUENCES))
    state = around.new_state(Room(1))
    first = Batch.of_sequences([[3, 1]], pages=[[0]])
    then = Batch.of_sequences([[4]], pages=[[0]], starts=[2])
    whole = plain.logits(Batch.of_sequences([[3, 1, 4]]))
    around.logits(first, state)
    assert np.array_equal(around.logits(then, state), whole)


def test_a_plugins_rewrite_learns_its_place_in_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[World] = []

    @lfm2kit.hookimpl
    def lfm2kit_rewrites(world: World, transport: Transport | None) -> Iterator[Rewrite]:
        places.append(world)
        if world.size > 1:
            yield replace(HALVES, is_automatic=True)

    plugins = plugins_of(monkeypatch, lfm2kit_rewrites)
    assert tiny(plugins).rewrites == ()
    assert [r.name for r in tiny(plugins, world=World(1, 3)).rewrites] == [
        "experts-over-ranks",
        "halves",
    ]
    assert places[-1] == World(1, 3)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("trim", "yielded 'trim', which is lfm2kit's"),
        ("experts-over-ranks", "yielded 'experts-over-ranks', which is lfm2kit's"),
        ("halves", "yielded 'halves', which is extra_0's"),
        ("two words", "yielded the name 'two words'"),
    ],
)
def test_a_name_that_is_taken_or_none_makes_a_plugin_broken(
    monkeypatch: pytest.MonkeyPatch, name: str, says: str
) -> None:
    @lfm2kit.hookimpl
    def second() -> Iterator[Rewrite]:
        yield replace(HALVES, name=name)

    plugins = plugins_of(monkeypatch, lfm2kit_rewrites, second)
    (broken,) = plugins.broken
    assert broken.name == "extra_1"
    assert says in broken.reason
    assert set(plugins.rewrites()) == {"trim", "halves"}


def test_a_hook_that_fails_for_a_rank_is_an_error_that_names_the_plugin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @lfm2kit.hookimpl
    def lfm2kit_rewrites(world: World) -> Iterator[Rewrite]:
        if world.size == 3:
            raise ValueError("three is a crowd")
        yield HALVES

    plugins = plugins_of(monkeypatch, lfm2kit_rewrites)
    with pytest.raises(Lfm2kitError, match=r"'extra_0', .* rank 1 of 3, raised ValueError: three"):
        tiny(plugins, world=World(1, 3))


def test_rewrites_come_in_the_order_asked_for_and_then_the_automatic_ones() -> None:
    there = {
        name: Rewrite(name, "", lambda model: model, is_automatic=name == "a") for name in "abc"
    }
    assert [r.name for r in chosen("cb", there)] == ["c", "b", "a"]
    assert [r.name for r in chosen("ba", there)] == ["b", "a"]
    with pytest.raises(Lfm2kitError, match="unknown rewrite 'd'"):
        chosen("d", there)
    with pytest.raises(Lfm2kitError, match="'b' is given twice"):
        chosen("bcb", there)


def test_specs_are_replaced_wherever_they_are() -> None:
    spec = small_spec()
    there = replaced(spec, in_halves)
    assert [type(layer.feed_forward) for layer in there.layers] == [
        Halves,
        Halves,
        specs.SparseMoe,
        specs.SparseMoe,
    ]
    assert there.layers[2] is spec.layers[2]
    assert there.parameters() == spec.parameters()


def test_a_rewritten_model_is_an_ordinary_one() -> None:
    trimmed = TRIM.apply(small_spec())
    assert type(trimmed) is specs.Model
    assert {type(one) for one in specs.leaves(trimmed)} > {specs.LastRows, specs.MLP}


def test_layers_that_a_rewrite_has_made_are_not_trimmed_and_give_all_rows() -> None:
    @dataclass(frozen=True, slots=True)
    class Mine(Spec):
        layer: specs.Layer
        kind: ClassVar[str] = "layer"

        def parts(self) -> tuple[Part, ...]:
            return self.layer.parts()

    def mine(*which: int) -> specs.Model:
        conv = small_spec(layer_types=["conv"] * 4, num_hidden_layers=4)
        layers = [Mine(x) if i in which else x for i, x in enumerate(conv.layers)]  # type: ignore[arg-type]
        return replace(conv, layers=tuple(layers))

    kept = [getattr(layer, "reach_in", "all") for layer in TRIM.apply(mine(1)).layers]
    assert kept == ["all", "all", None, 2]
    with pytest.raises(Lfm2kitError, match="cannot leave out rows of a Mine"):
        TRIM.apply(mine(3))
    with pytest.raises(Lfm2kitError, match="cannot leave out rows of a TrimmedLayer"):
        TRIM.apply(TRIM.apply(mine()))


def test_a_spec_that_nobody_joins_is_an_error_that_names_it() -> None:
    with pytest.raises(Lfm2kitError, match="backend 'reference' lacks Halves of layers 0-1"):
        build(small_spec(), rewrites=[replace(HALVES, joins={})])


def test_only_the_folder_of_rewrites_knows_what_they_do() -> None:
    """The plan, the placement, the command line and the conformance suite know them in general."""
    names = re.compile(r"trim(?!_blocks)|ExpertParallel|experts_over_ranks", re.IGNORECASE)
    paths = [path.relative_to(CORE) for path in CORE.rglob("*.py")]
    elsewhere = [path for path in paths if path.parts[0] != "rewrites"]
    assert len(elsewhere) > 80
    found = {str(path): names.findall((CORE / path).read_text()) for path in elsewhere}
    assert {name: hits for name, hits in found.items() if hits} == {}
