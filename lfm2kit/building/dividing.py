"""Decides between ranks that share experts and ranks that each hold all of them.

Experts that are shared out are read by one rank each, and others' tokens come to them.  That pays
where a rank's own tokens bring few rows to an expert, because a product of these takes as long as
reading its weights.  docs/decisions/0041-auto.md has the measurements.
"""

from __future__ import annotations

from collections.abc import Callable

from lfm2kit.building.options import Options
from lfm2kit.building.placement import Placed
from lfm2kit.host_exchange import PAST_HOST
from lfm2kit.memory import HOST
from lfm2kit.overlapped import ON
from lfm2kit.ranks.groups import AUTO, Grouping, each_alone, groupings
from lfm2kit.specs import Model, SparseMoe
from lfm2kit.transport import Transport, World

FEW_ROWS = 32  # of an expert, of a rank's own tokens: sharing it out pays up to this many


def choices(
    options: Options,
    model: Model,
    world: World,
    transport: Transport | None,
    tokens: int | None,
    placed_alone: Callable[[], Placed],
) -> list[Grouping]:
    """Return the groupings from which the first one is taken in which every share fits.

    A rank's forwards have `tokens` tokens, if that is known.  `placed_alone` returns the model with
    all experts on this rank.  Raise `Lfm2kitError` as `groupings` does.
    """
    shared = groupings(options.parallel, options.ep_size, world, transport)
    group = shared[0].of(world.rank)
    if tokens is None or len(group) == 1 or _asks_to_share(options):
        return shared
    if rows_of_an_expert(model, tokens) <= FEW_ROWS or not _is_apart(placed_alone()):
        return shared
    return [each_alone(world), *shared]


def rows_of_an_expert(model: Model, tokens: int) -> float:
    """Return the rows that an expert has for `tokens` tokens, in the layer where they are fewest.

    Tokens choose experts evenly.
    """
    blocks = (part.spec for layer in model.layers for part in layer.parts())
    routers = [block.router for block in blocks if isinstance(block, SparseMoe)]
    shares = (router.num_experts_per_tok / router.num_experts for router in routers)
    return tokens * min(shares, default=0.0)


def _asks_to_share(options: Options) -> bool:
    """Return whether the options leave no choice, or ask for what only ranks that share can do."""
    return (
        options.parallel != AUTO
        or options.ep_size is not None
        or options.load is not None
        or options.exchange == PAST_HOST
        or options.overlap == ON
    )


def _is_apart(placed: Placed) -> bool:
    """Return whether no block is in the host's memory, which ranks of a machine share."""
    return all(leaf.memory.name != HOST.name for leaf in placed.leaves())
