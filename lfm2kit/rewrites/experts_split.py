"""Experts split between a device, its link and the host, by a placement fixed at build time.

`SplitExperts` takes the place of a layer's `Experts`.  Each of its parts is a block of its own with
some of the experts: `resident` ones stay in the memory of the model, `streamed` ones are brought
there for each forward, and those of the `host` are computed by another backend, beside the others.
Which experts a part has never depends on the batch, and so neither do a sample's bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce
from itertools import count

from lfm2kit.backend import HOST, Adds, Array, Block
from lfm2kit.building.joins import Join
from lfm2kit.memory import Memory
from lfm2kit.rewrites.parted_experts import Places, SplitExperts, StreamedExperts
from lfm2kit.rewrites.rewrite import Rewrite, replaced
from lfm2kit.seam import begun
from lfm2kit.specs import Experts, Model, Spec

# For streamed experts: with more the link waits less, but fewer experts are resident; with larger
# ones the device has fewer products to begin.
SLOTS, EXPERTS_PER_SLOT = 4, 2


def experts_split(
    places: Mapping[int, Places], slots: int = SLOTS, experts_per_slot: int = EXPERTS_PER_SLOT
) -> Rewrite:
    """Return the rewrite that splits the experts of the given layers.

    The other layers stay as they are, and so does a layer of which a rank has only resident ones.
    Streamed experts share the slots, which are fewer or smaller if there are not as many experts.
    """

    def apply(model: Model) -> Model:
        layers = [_split(layer, places.get(i, Places())) for i, layer in enumerate(model.layers)]
        return replace(model, layers=tuple(_numbered(layers, slots, experts_per_slot)))

    return Rewrite(
        name="experts-split",
        summary="Split each layer's experts between a device, its link and the host.",
        apply=apply,
        joins={SplitExperts: _join, StreamedExperts: partial(Join, _as_they_are)},
    )


def _split(layer: Spec, places: Places) -> Spec:
    def split(spec: Spec) -> Spec:
        if not isinstance(spec, Experts):
            return spec
        parted = SplitExperts(spec, places)
        return parted if parted.streamed or parted.host else spec

    changed: Spec = replaced(layer, split)
    return changed


def _numbered(layers: Sequence[Spec], slots: int, experts_per_slot: int) -> list[Spec]:
    """Return the layers with the positions and slots of their streamed experts."""
    counts = [len(spec.streamed) for layer in layers for spec in _splits(layer)]
    each = min(experts_per_slot, max(counts, default=0))
    positions, portions = count(), sum(-(-experts // each) for experts in counts if experts)

    def numbered(spec: Spec) -> Spec:
        if isinstance(spec, SplitExperts) and spec.streamed:
            return replace(
                spec,
                position=next(positions),
                slots=min(slots, portions),
                experts_per_slot=each,
            )
        return spec

    return [replaced(layer, numbered) for layer in layers]


def _splits(spec: Spec) -> Sequence[SplitExperts]:
    if isinstance(spec, SplitExperts):
        return [spec]
    return [split for part in spec.parts() for split in _splits(part.spec)]


def _as_they_are(spec: StreamedExperts, experts: Block) -> Block:
    """Return the block of a backend that streams nothing."""
    return experts


def _join(outer: Memory) -> Join:
    """Return how a `SplitExperts` is made of its parts: on the host, if `outer` cannot add."""
    memory = outer if isinstance(outer, Adds) else HOST
    return Join(partial(ExpertsTogether, memory), memory)


class ExpertsTogether:
    """Begins the host's part, calls the others, and adds the deltas up once the host is done."""

    def __init__(self, memory: Adds, spec: SplitExperts, **parts: Block) -> None:
        self._add = memory.add
        self._host = parts.pop("host", None)
        self._here = list(parts.values())

    def __call__(self, x: Array, expert_ids: Array, expert_weights: Array) -> Array:
        inputs = x, expert_ids, expert_weights
        pending = begun(self._host, *inputs) if self._host is not None else None
        deltas = [part(*inputs) for part in self._here]
        if pending is None:
            return reduce(self._add, deltas)
        # What is here is added up while the host still works.
        here = [reduce(self._add, deltas)] if deltas else []
        return reduce(self._add, [*here, pending.end()])
