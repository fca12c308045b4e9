"""The times and bytes of a model's blocks, put together from the rates of a calibration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from lfm2kit import specs
from lfm2kit.backend import Format, Weights
from lfm2kit.building.curves import Curve, Float64
from lfm2kit.building.rank_rates import BlockKey, BlockRates
from lfm2kit.building.rates import MADE_BY, Calibration, Side
from lfm2kit.building.rates import Experts as ExpertsKey
from lfm2kit.errors import Lfm2kitError, Option
from lfm2kit.simulating.sendings import Int64


class Spent(NamedTuple):
    """The seconds of each rank, [ranks], and how long reading the weights alone takes of them."""

    seconds: Float64
    reading: Float64


@dataclass(slots=True)
class Blocks:
    """Some blocks that compute no experts, one after the other."""

    calls: list[Curve] = field(default_factory=list)
    kept_bytes: int = 0
    formats: set[tuple[str, str]] = field(default_factory=set)  # measured, and the model's own

    def add(self, rates: BlockRates, stored: str) -> None:
        self.calls.append(rates.call)
        self.kept_bytes += rates.kept_bytes
        self.formats.add((rates.key.stored, stored))

    def spent(self, rows: Int64) -> Spent:
        """Return what ranks spend with these rows, [ranks]; those without any spend nothing."""
        seconds, reading = np.zeros(len(rows)), np.zeros(len(rows))
        for call in self.calls:
            seconds += call.at(rows)
            reading += call.at(1)
        return Spent(seconds * (rows > 0), reading * (rows > 0))


class Experts(NamedTuple):
    """The experts of a layer."""

    side: Side
    stored: str  # the format of the model's own

    def spent(self, rows: Int64) -> Spent:
        """Return what ranks spend whose experts have these rows, [ranks, experts]."""
        product, is_used, fixed = self.side.product, rows > 0, self.side.call.fixed or 0.0
        share = fixed / self.side.call.experts  # that is in the time of each
        of_each: Float64 = ((product.at(rows) - share) * is_used).sum(axis=1)
        reading = (float(product.at(1)) - share) * is_used.sum(axis=1)
        return Spent(of_each + fixed * is_used.any(axis=1), reading)


class LayerRates(NamedTuple):
    """A layer's blocks before its experts, if it has some, and these."""

    number: int
    before: Blocks
    experts: Experts | None


@dataclass(frozen=True, slots=True)
class ModelRates:
    """The rates of all blocks of a model, in the order of its forward."""

    embedding: Blocks
    layers: Sequence[LayerRates]
    of_all_rows: Blocks  # after the layers
    of_logits: Blocks  # the same, for the rows that have logits

    @classmethod
    def of(cls, model: specs.Model, weights: Weights, found: Found) -> ModelRates:
        """Return the rates of a model; raise `Lfm2kitError` for a block without."""
        parts = {part.role: part for part in model.parts()}

        def blocks(*roles: str) -> Blocks:
            return found.blocks(
                *((parts[role].spec, weights.scope(parts[role].scope)) for role in roles)
            )

        return cls(
            blocks("embed_tokens"),
            [
                _layer(i, layer, weights.scope(f"layers.{i}"), found)
                for i, layer in enumerate(model.layers)
            ],
            blocks("last_rows"),
            blocks("embedding_norm", "lm_head"),
        )

    @property
    def of_experts(self) -> Side | None:
        """Return the rates of experts, and of what surrounds them; None if there are none."""
        return next((one.experts.side for one in self.layers if one.experts is not None), None)

    @property
    def kept_bytes(self) -> int:
        """Return the bytes of all weights but the experts'."""
        return sum(blocks.kept_bytes for blocks in self._blocks())

    @property
    def row_formats(self) -> dict[int, Format]:
        """Return the format in which the experts of each layer read rows."""
        return {
            layer.number: layer.experts.side.row_format
            for layer in self.layers
            if layer.experts is not None
        }

    def differing(self) -> str | None:
        """Say what the rates are of if the model's weights are stored in other formats."""
        experts = (layer.experts for layer in self.layers if layer.experts is not None)
        of_experts = {(one.side.experts.stored, one.stored) for one in experts}
        of_blocks = set[tuple[str, str]]().union(*(blocks.formats for blocks in self._blocks()))
        return "; ".join([*_said("experts", of_experts), *_said("other blocks", of_blocks)]) or None

    def _blocks(self) -> Iterator[Blocks]:
        yield from (self.embedding, self.of_all_rows, self.of_logits)
        yield from (layer.before for layer in self.layers)


class Found(NamedTuple):
    """The rates of one backend in one precision."""

    rates: str  # what errors call the calibration
    calibration: Calibration
    backend: str
    precision: str

    def blocks(self, *wanted: tuple[specs.Spec, Weights]) -> Blocks:
        """Return the rates of blocks that compute no experts, or of the parts of these.

        Each is given with the weights of its scope; rates of weights in another format are taken
        if there are no others.
        """
        blocks = Blocks()
        for spec, weights in wanted:
            for rates, stored in self._of(spec, weights):
                blocks.add(rates, stored)
        return blocks

    def experts(self, spec: specs.Experts, weights: Weights) -> Experts:
        """Return the rates of a layer's experts, those of another format if there are no others."""
        key = ExpertsKey.of(spec, weights, self.backend, self.precision)
        sides = [side for side in self.calibration.sides if side.experts[:4] == key[:4]]
        if not sides:
            raise self._no_rates(f"experts of {spec.hidden_size} x {spec.intermediate_size}")
        return Experts(max(sides, key=lambda side: side.experts == key), key.stored)

    def _of(self, spec: specs.Spec, weights: Weights) -> Iterator[tuple[BlockRates, str]]:
        """Yield rates, and the format in which the model's own weights are stored."""
        key = BlockKey.of(spec, weights, self.backend, self.precision)
        there = [one for one in self.calibration.blocks if one.key[:3] == key[:3]]
        if there:
            yield max(there, key=lambda one: one.key == key), key.stored
            return
        if not spec.parts():
            raise self._no_rates(repr(spec))
        for part in spec.parts():
            yield from self._of(part.spec, weights.scope(part.scope))

    def _no_rates(self, what: str) -> Lfm2kitError:
        there = {f"{key.backend} in {key.precision}" for key in _keys(self.calibration)}
        of_others = f"; it has rates of {' and '.join(sorted(there)) or 'no blocks'}"
        by = f"by {self.backend} in {self.precision}"
        return Lfm2kitError(
            f"{self.rates}: there are no rates of {what} {by}{of_others}; {MADE_BY} for this model"
        )


def found(calibration: Calibration, rates: str, backend: str | None, precision: str) -> Found:
    """Return the rates of a backend in a precision; without a backend, of the only one.

    Raise `Lfm2kitError` if there are several, or none.
    """
    there = sorted({key.backend for key in _keys(calibration) if key.precision == precision})
    if backend is None and len(there) != 1:
        said = f"of blocks by {' and '.join(there)}" if there else "of no blocks"
        advice = ("choose one by ", Option("backend")) if there else (f"{MADE_BY}",)
        raise Lfm2kitError(f"{rates}: these are rates {said} in {precision}; ", *advice)
    return Found(rates, calibration, backend or there[0], precision)


def _keys(calibration: Calibration) -> list[BlockKey]:
    return [one.key for one in calibration.blocks]


def _layer(number: int, layer: specs.Spec, weights: Weights, found: Found) -> LayerRates:
    others, experts = list[tuple[specs.Spec, Weights]](), None
    for scope, spec in _parts(layer, weights):
        if isinstance(spec, specs.Experts):
            experts = found.experts(spec, scope)
        else:
            others.append((spec, scope))
    return LayerRates(number, found.blocks(*others), experts)


def _said(what: str, formats: Iterable[tuple[str, str]]) -> Iterator[str]:
    for measured, stored in sorted(formats):
        if measured != stored:
            yield f"they are of {what} stored in {measured}, and the model's are in {stored}"


def _parts(spec: specs.Spec, weights: Weights) -> Iterator[tuple[Weights, specs.Spec]]:
    """Yield the parts of a layer with their weights; those with experts are taken apart."""
    if isinstance(spec, specs.Experts) or not _has_experts(spec):
        yield weights, spec
        return
    for part in spec.parts():
        yield from _parts(part.spec, weights.scope(part.scope))


def _has_experts(spec: specs.Spec) -> bool:
    return any(isinstance(leaf, specs.Experts) for leaf in specs.leaves(spec))
