"""Finds out how many of each layer's experts a device's memory has room for.

The rule is simple: the same number in every layer, those with the lowest ids.  Of the others, some
may be streamed, and the host computes the rest.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence

from lfm2kit import specs
from lfm2kit.backend import HOST, Backend
from lfm2kit.building.capacity import Sizes
from lfm2kit.building.placement import Placed
from lfm2kit.building.plan import Plan
from lfm2kit.errors import Lfm2kitError, Option
from lfm2kit.rewrites.parted_experts import Places

TOKENS = 2048  # at once, for which scratch memory is left
RESERVE = 1 / 16  # of the memory, for what no figure counts: captures, activations, the driver

Experts = Mapping[int, Sequence[int]]  # by layer, those that are wanted in the memory first


def on_devices(model: specs.Model, plan: Plan, create: Callable[[str], Backend]) -> Experts:
    """Returns the experts that the plan computes in other memories than the host's, by layer."""
    found = {}
    for i, layer in enumerate(model.layers):
        for kind, leaf in specs.leaves_by_kind(layer):
            if isinstance(leaf, specs.Experts):
                memory = create(plan.backend_for(i, kind)).memory(leaf)
                if memory.name != HOST.name and leaf.local_experts:
                    found[i] = leaf.local_experts
    return found


def places_that_fit(
    experts: Experts,
    place: Callable[[Mapping[int, Places]], Placed],
    sizes: Sizes,
    asked: Option,
    streamed: int = 0,
) -> Mapping[int, Places]:
    """Returns where experts have to be for the model to fit; nothing if it fits as it is.

    `streamed` of each layer's experts that do not stay are streamed, the rest are the host's.
    `sizes` know the limit.  Raises `Lfm2kitError` if there is nothing to split, or no figures.
    """
    if not experts:
        raise Lfm2kitError(asked, ": the plan has no experts in a device's memory")

    def places(resident: int) -> Mapping[int, Places]:
        away = {i: tuple(ids[resident:]) for i, ids in experts.items()}
        return {i: Places(ids[:streamed], ids[streamed:]) for i, ids in away.items() if ids}

    def is_too_much(resident: int) -> bool:
        return not _fits(place(places(resident)), sizes, asked)

    most = max(map(len, experts.values()))
    resident = bisect_left(range(most + 1), True, key=is_too_much) - 1
    return places(max(resident, 0))


def _fits(placed: Placed, sizes: Sizes, asked: Option) -> bool:
    for name, free in sizes.free(placed).items():
        leaves = [leaf for leaf in placed.leaves() if leaf.memory.name == name]
        if name == HOST.name:
            continue
        if sizes.unknown(leaves):
            raise Lfm2kitError(
                asked, f": a backend in memory '{name}' does not say how much its blocks take"
            )
        if sum(sizes.needed(leaves, TOKENS)) > (1 - RESERVE) * free:
            return False
    return True
