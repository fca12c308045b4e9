"""Places a model's experts so that it takes no more of a device's memory than is allowed.

With rates, from a file that is named or kept for this machine, the placement is the one with the
least predicted time (`predicting.py`).  Without them the rule is simple: the same number stays in
every layer, those that are used most, or have the lowest ids; of the others, some may be streamed,
and the host computes the rest.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lfm2kit import specs
from lfm2kit.backend import HOST
from lfm2kit.building.answers import Answers
from lfm2kit.building.capacity import PINNED
from lfm2kit.building.load import uniform, unused
from lfm2kit.building.plan import STREAMED_EXPERTS
from lfm2kit.building.predicting import Layer, Predictor
from lfm2kit.building.sharing import Budget, Place, Sharing
from lfm2kit.errors import Lfm2kitError, Option
from lfm2kit.rewrites import owners_by_layer
from lfm2kit.rewrites.experts_split import EXPERTS_PER_SLOT, SLOTS
from lfm2kit.rewrites.parted_experts import Places, StreamedExperts
from lfm2kit.transport import Owners

if TYPE_CHECKING:
    from lfm2kit.building.loading import Setup

TOKENS = 2048  # of a forward, for which scratch memory is left and times are predicted
RESERVE = 1 / 16  # of the memory, for what no figure counts: captures, activations, the driver


def fitted(whole: Setup, tokens: int) -> Setup:
    """Return the set-up with as many experts in the devices' memory as its options allow.

    Raise `Lfm2kitError` if there is nothing to split, a file does not fit the model, or a backend
    does not say how much its blocks take.
    """
    options, layers = whole.options, list(on_devices(whole))
    if not layers:
        asked = Option("gpu_memory", options.gpu_memory)
        nothing = ": the plan has no experts in a device's memory"
        raise Lfm2kitError(asked, f"{nothing}; leave it out, or give a plan that has some there")
    if options.streamed_experts:
        _check_streamed(whole, layers, options.streamed_experts)
    named = None if options.rates is None else _named(whole, layers, tokens, Path(options.rates))
    if _room(whole, tokens) >= 0:
        return whole
    predictor, note = named or _kept(whole, layers, tokens)
    whole = replace(whole, placing=note)
    if predictor is None:
        return _alike(whole, layers, tokens)
    if options.streamed_experts is None:
        sharing = predictor.cheapest(*_budget(whole, layers, tokens))
        return replace(_shared(whole, layers, sharing), sharing=sharing)
    found = _alike(whole, layers, tokens)
    return replace(found, sharing=predictor.of(found.placed.spec))


def _check_streamed(whole: Setup, layers: Sequence[Layer], count: int) -> None:
    """Raise `Lfm2kitError` if a layer's are not streamed, or all layers have fewer than `count`."""
    asked, most = Option("streamed_experts", count), max(one.spec.num_experts for one in layers)
    if count > most:
        there = f": the model has {most} experts in a layer; try "
        raise Lfm2kitError(asked, there, Option("streamed_experts", most))
    for layer in layers:
        item = _streaming_item(whole, layer)
        if not _streams(whole, layer):
            not_here = f": '{item}' does not stream the experts of layer {layer.number}"
            raise Lfm2kitError(asked, f"{not_here}; leave it out, or give a plan that streams them")


def _streaming_item(whole: Setup, layer: Layer) -> str:
    """Return the plan's item for the streamed part of a layer's experts."""
    return whole.plan.backend_for(layer.number, STREAMED_EXPERTS)


def _streams(whole: Setup, layer: Layer) -> bool:
    """Return whether the layer's streamed part is streamed: else its experts would all stay."""
    item = _streaming_item(whole, layer)
    asked = Answers(whole.create(item), item, f"layers.{layer.number}")
    return asked.why_unsupported(StreamedExperts(layer.spec, 0, SLOTS, EXPERTS_PER_SLOT)) is None


def _named(
    whole: Setup, layers: Sequence[Layer], tokens: int, path: Path
) -> tuple[Predictor, str | None]:
    """Return what predicts times by the rates in a file, and a note if they are not this machine's.

    They may be another one's, so that a plan can be made for it.
    """
    differing, predictor = Predictor.read(whole, layers, tokens, path)
    if not differing:
        return predictor, None
    return predictor, f"the rates in {path} were not measured here: {'; '.join(differing)}"


def _kept(whole: Setup, layers: Sequence[Layer], tokens: int) -> tuple[Predictor | None, str]:
    """Return what predicts times by the rates of this machine, if they are kept, and a note."""
    try:
        path, predictor = Predictor.kept(whole, layers, tokens)
    except Lfm2kitError as error:
        return None, f"experts are placed without predicted times: {error}"
    return predictor, f"experts are placed by the rates in {path}"


def on_devices(whole: Setup) -> Iterator[Layer]:
    """Yield the layers of which the plan computes experts in other memories than the host's."""
    model, shares = whole.placed.spec, _shares(whole)
    assert isinstance(model, specs.Model)
    owners, rank = owners_by_layer(model), whole.group.index(whole.world.rank)
    for i, layer in enumerate(model.layers):
        for scope, spec in _experts(layer, f"layers.{i}"):
            item = whole.plan.backend_for(i, spec.kind)
            memory = Answers(whole.create(item), item, f"layers.{i}").memory(spec)
            if spec.local_experts and memory.name != HOST.name:
                asking = owners.get(i, ((rank,) * spec.num_experts,))
                of_local = (shares[i][e] * _part(asking, e, rank) for e in spec.local_experts)
                yield Layer(i, spec, scope, item, tuple(of_local))


def _part(owners: Owners, expert: int, rank: int) -> float:
    """Return the part of all ranks for which `rank` computes an expert."""
    return sum(ranks[expert] == rank for ranks in owners) / len(owners)


def _experts(spec: specs.Spec, scope: str) -> Iterator[tuple[str, specs.Experts]]:
    if isinstance(spec, specs.Experts):
        yield scope, spec
    for part in spec.parts():
        yield from _experts(part.spec, f"{scope}.{part.scope}".strip("."))


def _shares(whole: Setup) -> dict[int, Sequence[float]]:
    """Return how often each expert is chosen, by layer: as recorded, or all alike."""
    load, model = whole.load, whole.checkpoint.spec
    numbers = [one.layer for one in unused(model)]
    shares = uniform(model) if load is None else load.shares()
    return dict(zip(numbers, shares, strict=True))


def _room(setup: Setup, tokens: int) -> int:
    """Return the bytes that are left in the device's memory with the fewest, below 0 if too few.

    Without such a memory it is 0.
    """
    sizes, left = setup.sizes, []
    for name, free in sizes.free(setup.placed).items():
        leaves = [leaf for leaf in setup.placed.leaves() if leaf.memory.name == name]
        if name == HOST.name:
            continue
        if sizes.unknown(leaves):
            raise Lfm2kitError(
                Option("gpu_memory", setup.options.gpu_memory),
                f": a backend in memory '{name}' does not say how much its blocks take",
            )
        left.append(int((1 - RESERVE) * free) - sum(sizes.needed(setup.placed, name, tokens)))
    return min(left, default=0)


def _alike(whole: Setup, layers: Sequence[Layer], tokens: int) -> Setup:
    """Return the set-up in which as many experts stay as fit, in every layer the same number."""
    streamed = whole.options.streamed_experts or 0

    def with_resident(count: int) -> Setup:
        away = {layer.number: layer.wanted[count:] for layer in layers}
        places = {i: Places(ids[:streamed], ids[streamed:]) for i, ids in away.items() if ids}
        return whole.split(places)

    def is_too_much(count: int) -> bool:
        return _room(with_resident(count), tokens) < 0

    most = max(len(layer.wanted) for layer in layers)
    too_many = bisect_left(range(most), True, key=is_too_much)
    return with_resident(max(too_many - 1, 0))


def _budget(whole: Setup, layers: Sequence[Layer], tokens: int) -> tuple[Budget, int]:
    """Return what experts may take, and the bytes of one of them in the device's memory."""
    none = whole.split({layer.number: Places((), layer.wanted) for layer in layers})
    room, count = _room(none, tokens), sum(len(layer.wanted) for layer in layers)
    one = max(1, -(-(room - _room(whole, tokens)) // count))
    pinned = int(PINNED * HOST.free_bytes(whole.context.local_ranks))
    budget = Budget(max(room, 0), pinned, portion=EXPERTS_PER_SLOT)
    can_stream = all(_streams(whole, layer) for layer in layers)
    return (budget if can_stream else replace(budget, slots=())), one


def _shared(whole: Setup, layers: Sequence[Layer], sharing: Sharing) -> Setup:
    """Return the set-up with the experts where the sharing says."""

    def ids(index: int, place: Place) -> tuple[int, ...]:
        return tuple(layers[index].spec.local_experts[e] for e in sharing.at(index, place))

    places = {
        layer.number: Places(ids(i, Place.STREAMED), ids(i, Place.HOST))
        for i, layer in enumerate(layers)
    }
    return whole.split(places, max(1, sharing.slots.count), max(1, sharing.slots.experts))
