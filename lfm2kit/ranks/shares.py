"""Sets up the share of every rank of a job that is only planned."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cache

from lfm2kit.building.load import load_of
from lfm2kit.building.loading import Setup, set_up
from lfm2kit.building.options import Options
from lfm2kit.building.plugins import Plugins, installed_plugins
from lfm2kit.checkpoint import Checkpoint
from lfm2kit.ranks.balancing import owners_by
from lfm2kit.ranks.groups import Grouping, first_fitting
from lfm2kit.rewrites import built_in, chosen, owners_among
from lfm2kit.transport import World, held_by_all


def shares(
    checkpoint: Checkpoint, options: Options, nodes: Sequence[int], tokens: int
) -> list[Setup]:
    """Return each rank's set-up, in order of rank, for ranks on machines like this one.

    `nodes` are the machines of the ranks, [ranks].  Ranks that hold the same experts, beside as
    many others, have one set-up, that of the first.  As in a job, all ranks share the experts if a
    smaller group's share does not fit on one of them.
    """
    worlds, plugins = World.of_all(nodes), installed_plugins()
    held_in = _experts_held(checkpoint, options, plugins)

    @cache
    def within(grouping: Grouping) -> list[Setup]:
        found: dict[Hashable, Setup] = {}
        places = list(_places(grouping, worlds, held_in))
        for world, place in zip(worlds, places, strict=True):
            if place not in found:
                found[place] = set_up(
                    checkpoint,
                    options,
                    world=world,
                    plugins=plugins,
                    tokens=tokens,
                    grouping=grouping,
                )
        return [found[place] for place in places]

    def fits(grouping: Grouping) -> bool:
        return all(setup.fits(tokens) for setup in distinct(within(grouping)))

    first = set_up(checkpoint, options, world=worlds[0], plugins=plugins, tokens=tokens)
    return within(first_fitting(first.choices, fits))


def _places(
    grouping: Grouping, worlds: Sequence[World], held_in: Callable[[int], Sequence[Hashable]]
) -> Iterator[Hashable]:
    """Yield what each rank's share depends on: what it holds, and who is beside it."""
    places = {rank: (len(group), i) for group in grouping.groups for i, rank in enumerate(group)}
    for world in worlds:
        size, number = places[world.rank]
        yield held_in(size)[number], size, world.local_size


def _experts_held(
    checkpoint: Checkpoint, options: Options, plugins: Plugins
) -> Callable[[int], Sequence[Hashable]]:
    """Return a function that returns what distinguishes the ranks of a group of some size.

    It is which experts they hold; their numbers, if a plugin's rewrite may say otherwise.
    """
    load = load_of(options.load, checkpoint.spec)

    @cache
    def held_in(size: int) -> Sequence[Hashable]:
        world = World(size=size)
        ours = {rewrite.name for rewrite in built_in(world, None)}
        applied = chosen(options.rewrites, plugins.rewrites(world), plugins.skipped())
        if any(rewrite.name not in ours for rewrite in applied):
            return range(size)
        by_load = None if load is None else owners_by(load, size, options.replicate_experts)
        tables = owners_among(checkpoint.spec, size, by_load).values()
        held = {owners: held_by_all(owners) for owners in set(tables)}
        return list(zip(*(held[owners] for owners in tables), strict=True)) or [()] * size

    return held_in


def distinct(setups: Sequence[Setup]) -> list[Setup]:
    """Return each set-up of `setups` once, in order; ranks may have the same one."""
    return list({id(one): one for one in setups}.values())
