"""Has every layer built in parts, to show what building layers whole buys."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from lfm2kit.building.joins import Join, Joins
from lfm2kit.model import DecoderLayer
from lfm2kit.rewrites.rewrite import Rewrite
from lfm2kit.specs import Layer, Model, Part, Spec


@dataclass(frozen=True, slots=True)
class ApartLayer(Spec):
    """(hidden, delta, batch, state) -> (hidden, delta), those of `layer`, joined of its parts."""

    layer: Layer
    kind: ClassVar[str] = "layer"
    has_state: ClassVar[bool] = True

    def parts(self) -> tuple[Part, ...]:
        return self.layer.parts()


def apart() -> Rewrite:
    """Return the rewrite that puts such a layer in place of each."""

    def apply(model: Model) -> Model:
        layers = (ApartLayer(one) if isinstance(one, Layer) else one for one in model.layers)
        return replace(model, layers=tuple(layers))

    joins: Joins = {ApartLayer: partial(Join, DecoderLayer)}
    return Rewrite("apart", "Build every layer in parts.", apply, joins)
