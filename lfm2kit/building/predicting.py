"""Predicts how long a forward of a set-up takes, from a calibration and a recorded load."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lfm2kit import specs
from lfm2kit.backend import F32, HOST, Ceilings, Crosses, Memory, PicksRows
from lfm2kit.batch import Batch
from lfm2kit.building.answers import Answers
from lfm2kit.building.kept_rates import check_hardware, differences, read_kept
from lfm2kit.building.overlap import NO_SLOTS, Slots
from lfm2kit.building.rates import Calibration, Experts, Rates, read_calibration
from lfm2kit.building.sharing import Budget, Place, Sharing, Trip, predicted, shared_out
from lfm2kit.errors import Lfm2kitError
from lfm2kit.records.machine import described, hardware_of
from lfm2kit.rewrites.parted_experts import SplitExperts

if TYPE_CHECKING:
    from lfm2kit.building.loading import Setup

SEQUENCE = 16  # tokens of a sequence, for the work of what looks across tokens


class Layer(NamedTuple):
    """A layer whose experts the plan computes in a device's memory."""

    number: int
    spec: specs.Experts
    scope: str  # of the experts in the checkpoint's names
    item: str  # of the plan: who builds them
    # Of the tokens of all ranks that share experts, those that each of the local experts gets here.
    shares: tuple[float, ...]

    @property
    def wanted(self) -> tuple[int, ...]:
        """Return the ids of the local experts, those that are used most first."""
        both = zip(self.shares, self.spec.local_experts, strict=True)
        return tuple(e for _, e in sorted(both, key=lambda one: (-one[0], one[1])))


@dataclass(frozen=True, slots=True)
class Predictor:
    """What predictions for one model on one machine rest on."""

    layers: Sequence[Layer]
    rates: Rates
    rows: int  # tokens whose experts may be here
    rest: Sequence[float] | None  # the device's seconds for all but experts, by layer, if known
    trip: Trip  # of a layer's tokens to the host, and of its results back

    @classmethod
    def read(
        cls, whole: Setup, layers: Sequence[Layer], tokens: int, path: Path
    ) -> tuple[list[str], Predictor]:
        """Return a predictor for forwards of `tokens` tokens, with the rates of a file.

        Return first what differs from this machine where the rates were measured, in words.
        Raise `Lfm2kitError` if the file lacks the rates of the model's experts.
        """
        calibration = read_calibration(path)
        predictor = cls._of(whole, layers, tokens, path, calibration)
        return _differing(whole, layers[0], calibration), predictor

    @classmethod
    def kept(cls, whole: Setup, layers: Sequence[Layer], tokens: int) -> tuple[Path, Predictor]:
        """Return what `read` does, with the file that is kept for this machine.

        Raise `Lfm2kitError` if there is none, or none for this device and the model's experts.
        """
        (path, calibration), one = read_kept(whole.context), layers[0]
        now = _hardware(whole, one, one.item)
        check_hardware(path, calibration, _measured(whole, one, one.item), now)
        return path, cls._of(whole, layers, tokens, path, calibration)

    @classmethod
    def _of(
        cls,
        whole: Setup,
        layers: Sequence[Layer],
        tokens: int,
        path: Path,
        calibration: Calibration,
    ) -> Predictor:
        one = layers[0]
        host, device = _measured_of_all(whole, layers, path)
        rates = calibration.rates(path, host, device)
        ceilings = next(s.ceilings for s in calibration.sides if s.experts == device)
        model, numbers = whole.checkpoint.spec, {layer.number for layer in layers}
        rest = None if ceilings is None else list(_rest(model, numbers, ceilings, tokens))
        # Experts are used by the tokens of all ranks that share them.
        rows = tokens * len(whole.group)
        return cls(layers, rates, rows, rest, _trip(whole, one, rates))

    def cheapest(self, budget: Budget, expert_bytes: int) -> Sharing:
        """Return the sharing with the least predicted time, if an expert takes these bytes."""
        link = self.rates.link * expert_bytes / self.rates.expert_bytes
        rates = replace(self.rates, expert_bytes=expert_bytes, link=link)
        return shared_out(rates, self._shares, self.rows, budget, self.rest, self.trip)

    def of(self, model: specs.Spec) -> Sharing:
        """Return what is predicted for a model whose experts are split."""
        assert isinstance(model, specs.Model)
        splits = [next(_splits(model.layers[layer.number]), None) for layer in self.layers]
        places = [list(_places(*both)) for both in zip(self.layers, splits, strict=True)]
        streamed = [split for split in splits if split is not None and split.streamed]
        slots = Slots(streamed[0].slots, streamed[0].experts_per_slot) if streamed else NO_SLOTS
        return predicted(self.rates, self._shares, self.rows, places, slots, self.rest, self.trip)

    @property
    def _shares(self) -> list[tuple[float, ...]]:
        return [layer.shares for layer in self.layers]


def _measured(whole: Setup, layer: Layer, item: str) -> Experts:
    """Return the key of the rates at which a plan's item builds a layer's experts."""
    precision = whole.plugins.precision(item, whole.context.precision).name
    return Experts.of(layer.spec, whole.checkpoint.weights.scope(layer.scope), item, precision)


def _measured_of_all(whole: Setup, layers: Sequence[Layer], path: Path) -> tuple[Experts, Experts]:
    """Return the keys of the rates at the host and at the device, which all layers have.

    Raise `Lfm2kitError`, which names the file of the rates, if layers need different ones.
    """
    needed = [
        tuple(_measured(whole, one, item) for item in (whole.host_item(one.number), one.item))
        for one in layers
    ]
    (host, device), first = needed[0], layers[0].number
    for layer, keys in zip(layers, needed, strict=True):
        for here, there in zip((host, device), keys, strict=True):
            if here != there:
                raise Lfm2kitError(
                    f"{path}: rates place experts that are alike in all layers, but layer {first} "
                    f"has {here} and layer {layer.number} has {there}; without rates, the same "
                    "number stays in every layer"
                )
    return host, device


def _hardware(whole: Setup, layer: Layer, item: str) -> dict[str, str]:
    """Return what a plan's item computes a layer's experts on."""
    asked = Answers(whole.create(item), item)
    return hardware_of(asked, asked.memory(layer.spec))


def _differing(whole: Setup, layer: Layer, calibration: Calibration) -> list[str]:
    """Say what differs from this machine, or from a device that its rates are of."""
    found = list(differences(calibration.machine, described(whole.context)))
    for item in (layer.item, whole.host_item(layer.number)):
        key = _measured(whole, layer, item)
        then = next(side.hardware for side in calibration.sides if side.experts == key)
        found += differences(then, _hardware(whole, layer, item))
    return found


def _trip(whole: Setup, layer: Layer, rates: Rates) -> Trip:
    """Return what it takes to bring x, ids and weights of a token to the host, and delta back."""
    hidden_size, k = layer.spec.hidden_size, layer.spec.num_experts_per_tok
    one, choice = F32.nbytes((hidden_size,)), 2 * F32.nbytes((k,))
    memory = Answers(whole.create(layer.item), layer.item).memory(layer.spec)
    picks = isinstance(memory, PicksRows) and _is_crossed(whole, layer.spec, memory)
    return Trip((one + choice) / rates.to_host, one / rates.link, is_of_all=not picks)


def _is_crossed(whole: Setup, spec: specs.Experts, memory: Memory) -> bool:
    """Return whether a backend of the plan calls experts on the host from this memory."""
    backends = map(whole.create, sorted(whole.plan.backends()))
    crossing = (backend for backend in backends if isinstance(backend, Crosses))
    return any(one.why_not_crossed(spec, HOST, memory) is None for one in crossing)


def _rest(
    model: specs.Model, numbers: set[int], ceilings: Ceilings, tokens: int
) -> Iterator[float]:
    """Yield the device's seconds for all but experts, at best, for each of the layers `numbers`.

    The time of layers before that are not among them is included.
    """
    batch, before = Batch.of_sequences([[0] * SEQUENCE] * -(-tokens // SEQUENCE)), 0.0
    for i, layer in enumerate(model.layers):
        for leaf in specs.leaves(layer):
            if not isinstance(leaf, specs.Experts):
                work = leaf.work(batch)
                before += max(work.flops / ceilings.flops, work.bytes / ceilings.bytes)
        if i in numbers:
            yield before
            before = 0.0


def _splits(spec: specs.Spec) -> Iterator[SplitExperts]:
    if isinstance(spec, SplitExperts):
        yield spec
        return
    for part in spec.parts():
        yield from _splits(part.spec)


def _places(layer: Layer, split: SplitExperts | None) -> Iterator[Place]:
    """Yield where each of the local experts is."""
    for e in layer.spec.local_experts:
        if split is not None and e in split.streamed:
            yield Place.STREAMED
        else:
            is_away = split is not None and e in split.host
            yield Place.HOST if is_away else Place.RESIDENT
