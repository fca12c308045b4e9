"""Sets up the share of every rank of a job that is only planned."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from lfm2kit.building.loading import Setup, set_up
from lfm2kit.building.options import Options
from lfm2kit.building.plugins import installed_plugins
from lfm2kit.checkpoint import Checkpoint
from lfm2kit.ranks.groups import Grouping, first_fitting, groupings
from lfm2kit.transport import World


def shares(
    checkpoint: Checkpoint, options: Options, nodes: Sequence[int], tokens: int
) -> list[Setup]:
    """Return each rank's set-up, in order of rank, for ranks on machines like this one.

    `nodes` are the machines of the ranks, [ranks].  Ranks that hold the same experts, beside as
    many others, have one set-up, that of the first.  As in a job, all ranks share the experts if a
    smaller group's share does not fit on one of them.
    """
    worlds, plugins = World.of_all(nodes), installed_plugins()

    @cache
    def within(grouping: Grouping) -> list[Setup]:
        found: dict[tuple[int, int, int], Setup] = {}
        places = _places(grouping, worlds)
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

    asked = groupings(options.parallel, options.ep_size, worlds[0], None)
    return within(first_fitting(asked, fits))


def _places(grouping: Grouping, worlds: Sequence[World]) -> list[tuple[int, int, int]]:
    """Return what each rank's share depends on: its place in its group, and who is beside it."""
    places = {rank: (i, len(group)) for group in grouping.groups for i, rank in enumerate(group)}
    return [(*places[world.rank], world.local_size) for world in worlds]


def distinct(setups: Sequence[Setup]) -> list[Setup]:
    """Return each set-up of `setups` once, in order; ranks may have the same one."""
    return list({id(one): one for one in setups}.values())
