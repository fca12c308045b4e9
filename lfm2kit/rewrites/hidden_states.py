"""Gives the hidden states after chosen layers, whatever builds the model's blocks.

A `WatchedLayer` takes the place of each such layer.  Backends do not know it, so the core joins it
of the layer, which a backend may still build whole, and a copy of its result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from operator import index
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from lfm2kit.backend import Array, Operator, Room
from lfm2kit.batch import Batch
from lfm2kit.building.joins import Join
from lfm2kit.errors import Lfm2kitError
from lfm2kit.memory import Memory, arriving
from lfm2kit.rewrites.rewrite import Rewrite
from lfm2kit.specs import Model, Part, Spec

Float32 = npt.NDArray[np.float32]
Arriving = tuple[Callable[[], Any], Callable[[], Any]]  # hidden and delta, once they are there


@dataclass(frozen=True, slots=True)
class WatchedLayer(Spec):
    """(hidden, delta, batch, state) -> (hidden, delta), those of `layer`, which are copied."""

    layer: Spec
    number: int
    kind: ClassVar[str] = "layer"

    def parts(self) -> tuple[Part, ...]:
        return (Part("layer", "", self.layer),)


class HiddenStates:
    """What comes out of some layers in this process's newest forward.

        states = lfm2kit.HiddenStates([5, 11])
        model = lfm2kit.load_model("tiny", hidden_states=states)
        model.logits(batch)
        states.newest()[5]  # after layer 5: float32 [batch.tokens, hidden_size]

    Layers count from 0.  The output of layer i is what transformers calls `hidden_states[i + 1]`,
    but for the last layer, whose output it norms.  A forward that is watched is not captured, and
    keeps two arrays of its rows for each of these layers until the next one.
    """

    def __init__(self, layers: Iterable[int]) -> None:
        self.layers = tuple(sorted({index(layer) for layer in layers}))
        self._newest: dict[int, Arriving] = {}
        self._coming: dict[int, Arriving] = {}  # of a forward that has not shown all layers yet

    def newest(self) -> dict[int, Float32]:
        """Return the rows of the newest forward by layer: float32 [batch.tokens, hidden_size].

        Those of a rank of a job are of its own samples.  Before the first forward there are none,
        and a forward that has failed leaves those of the one before.
        """
        return {layer: hidden() + delta() for layer, (hidden, delta) in self._newest.items()}

    def clear(self) -> None:
        """Forget the forwards up to now."""
        self._newest, self._coming = {}, {}

    def rewrite(self) -> Rewrite:
        """Return the rewrite that makes a model's layers show their results here."""
        return Rewrite(
            name="hidden-states",
            summary="Give the hidden states after chosen layers.",
            apply=self._watched,
            joins={WatchedLayer: self._join},
            needs_rows=True,
        )

    def _watched(self, model: Model) -> Model:
        layers = list(model.layers)
        for number in self.layers:
            if not 0 <= number < len(layers):
                raise Lfm2kitError(
                    f"hidden states after layer {number}: the model has layers 0 to "
                    f"{len(layers) - 1}"
                )
            layers[number] = WatchedLayer(layers[number], number)
        return replace(model, layers=tuple(layers))

    def _join(self, outer: Memory) -> Join:
        def make(spec: WatchedLayer, layer: Operator) -> Operator:
            return _Watched(layer, lambda *arrays: self._show(spec.number, outer, *arrays))

        return Join(make, outer, is_capturable=False)

    def _show(self, number: int, memory: Memory, hidden: Array, delta: Array) -> None:
        """Begin to copy a layer's result: the next norm may add `delta` to `hidden` in place."""
        self._coming[number] = arriving(memory, hidden), arriving(memory, delta)
        if number == self.layers[-1]:
            self._newest, self._coming = self._coming, {}


class _Watched:
    """A layer that shows what it returns."""

    def __init__(self, layer: Operator, show: Callable[[Array, Array], None]) -> None:
        self._layer, self._show = layer, show

    def __call__(
        self, hidden: Array, delta: Array | None, batch: Batch, state: Any
    ) -> tuple[Array, Array]:
        hidden, delta = self._layer(hidden, delta, batch, state)
        self._show(hidden, delta)
        return hidden, delta

    def new_state(self, room: Room) -> Any:
        return self._layer.new_state(room)
