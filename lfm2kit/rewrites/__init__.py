"""Rewrites: changes to the model as data, before its blocks are placed.

The rest of the core knows rewrites in general.  Only this package knows what each one does.
"""

from __future__ import annotations

from collections.abc import Iterator

from lfm2kit.building.joins import Join, Joins
from lfm2kit.host_exchange import AUTO
from lfm2kit.rewrites.experts_over_ranks import (
    OwnersOf,
    experts_over_ranks,
    owners_among,
    owners_by_layer,
)
from lfm2kit.rewrites.parted_experts import Places, SplitExperts, StreamedExperts
from lfm2kit.rewrites.plugged import kept_to_contract
from lfm2kit.rewrites.rewrite import Rewrite, chosen, replaced, rewritten
from lfm2kit.rewrites.trim import TRIM
from lfm2kit.seam import begun
from lfm2kit.transport import Transport, World

__all__ = [
    "Join",
    "Joins",
    "OwnersOf",
    "Places",
    "Rewrite",
    "SplitExperts",
    "StreamedExperts",
    "begun",
    "built_in",
    "chosen",
    "kept_to_contract",
    "owners_among",
    "owners_by_layer",
    "replaced",
    "rewritten",
]


def built_in(
    world: World,
    transport: Transport | None,
    owners_of: OwnersOf | None = None,
    exchange: str = AUTO,
) -> Iterator[Rewrite]:
    """Yield lfm2kit's own rewrites, as a plugin's `lfm2kit_rewrites` yields others."""
    yield TRIM
    if world.size > 1:
        yield experts_over_ranks(world, transport, owners_of, exchange)
