"""Counts how many tokens choose each expert, whatever builds the model's blocks.

A `RecordedRouter` takes the place of every `Router`.  Backends do not know it, so the core joins it
of the router and a counter, and builds around it what a backend would build whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from lfm2kit.backend import Array, Block
from lfm2kit.building.joins import Join
from lfm2kit.building.load import LayerLoad, Load, unused
from lfm2kit.errors import Lfm2kitError
from lfm2kit.memory import Memory, arriving
from lfm2kit.rewrites.rewrite import Rewrite, replaced
from lfm2kit.specs import Model, Part, Router, Spec
from lfm2kit.transport import Transport

MOST_PENDING = 256  # arrays of ids that may be on their way to the host
Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class RecordedRouter(Spec):
    """(x) -> (expert_ids, expert_weights), those of `router`, whose ids are counted."""

    router: Router
    layer: int
    kind: ClassVar[str] = "router"

    def parts(self) -> tuple[Part, ...]:
        return (Part("router", "", self.router),)


class LoadRecorder:
    """How many tokens of this process's forwards chose each expert, by layer."""

    def __init__(self) -> None:
        self._counts: dict[int, npt.NDArray[np.int64]] = {}  # the experts', and then all tokens'
        self._pending: list[tuple[int, Callable[[], Ids]]] = []

    def rewrite(self) -> Rewrite:
        """Return the rewrite that makes a model's routers count here."""
        return Rewrite(
            name="record-load",
            summary="Count the tokens that choose each expert.",
            apply=_recorded,
            joins={RecordedRouter: self._join},
            needs_rows=True,
        )

    def clear(self) -> None:
        """Forget the forwards up to now."""
        self._settle()
        for counts in self._counts.values():
            counts[:] = 0

    def load(self, name: str, model: Model, transport: Transport | None) -> Load | None:
        """Return the load of the forwards up to now, those of all ranks of a job on rank 0.

        `model` is the one called `name` before any rewrite.  None on the other ranks.  A job's load
        has the sum, which one process would have recorded, and the counts of each rank's tokens.
        """
        self._settle()
        mine = np.concatenate(list(self._counts.values()))[None]
        everyone = mine if transport is None else transport.gather(mine)
        if everyone is None:
            return None
        ends = np.cumsum([len(counts) for counts in self._counts.values()])
        by_rank = dict(zip(self._counts, np.split(everyone, ends[:-1], axis=1), strict=True))
        layers = [_of_layer(one, by_rank[one.layer][:, :-1]) for one in unused(model)]
        tokens = max(int(counts[:, -1].sum()) for counts in by_rank.values())
        return Load(name, model.embed_tokens.hidden_size, tokens, tuple(layers))

    def _settle(self) -> None:
        """Wait for the ids that are on their way, and count them."""
        for layer, arrived in self._pending:
            ids, counts = arrived(), self._counts[layer]
            chosen = ids >= 0  # the others are nobody's
            counts[:-1] += np.bincount(ids[chosen], minlength=len(counts) - 1)
            counts[-1] += np.count_nonzero(chosen.any(axis=1))
        self._pending.clear()

    def _join(self, outer: Memory) -> Join:
        """Return how a `RecordedRouter` is made; a replay would call no counter."""

        def make(spec: RecordedRouter, router: Block) -> Block:
            self._counts[spec.layer] = np.zeros(spec.router.num_experts + 1, np.int64)

            def recorded(x: Array) -> tuple[Array, Array]:
                expert_ids, expert_weights = router(x)
                self._add(spec.layer, arriving(outer, expert_ids))
                return expert_ids, expert_weights

            return recorded

        return Join(make, outer, is_capturable=False)

    def _add(self, layer: int, arrived: Callable[[], Ids]) -> None:
        self._pending.append((layer, arrived))
        if len(self._pending) >= MOST_PENDING:
            self._settle()


def _of_layer(layer: LayerLoad, by_rank: npt.NDArray[np.int64]) -> LayerLoad:
    """Return the layer's load, of counts [ranks, experts]."""
    ranks = tuple(map(tuple, by_rank.tolist())) if len(by_rank) > 1 else ()
    return layer._replace(counts=tuple(by_rank.sum(axis=0).tolist()), by_rank=ranks)


def _recorded(model: Model) -> Model:
    def change(layer: int, spec: Spec) -> Spec:
        return RecordedRouter(spec, layer) if isinstance(spec, Router) else spec

    layers = tuple(replaced(layer, partial(change, i)) for i, layer in enumerate(model.layers))
    if layers == model.layers:
        raise Lfm2kitError("the model has no router, so there is no load to record")
    return replace(model, layers=layers)
