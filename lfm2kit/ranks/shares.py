"""Sets up the share of every rank of a job that is only planned."""

from __future__ import annotations

from collections.abc import Sequence

from lfm2kit.building.loading import Setup, set_up
from lfm2kit.building.options import Options
from lfm2kit.checkpoint import Checkpoint
from lfm2kit.ranks.groups import Grouping, groupings
from lfm2kit.transport import World


def shares(
    checkpoint: Checkpoint, options: Options, nodes: Sequence[int], tokens: int
) -> list[Setup]:
    """Return each rank's set-up, in order of rank, for ranks on machines like this one.

    `nodes` are the machines of the ranks, [ranks].  Ranks that hold the same experts, beside as
    many others, have one set-up, that of the first.  As in a job, all ranks share the experts if a
    smaller group's share does not fit on one of them.
    """
    worlds = [World.of(rank, nodes) for rank in range(len(nodes))]
    found = _in_groups(checkpoint, options, worlds, tokens, None)
    if len({len(setup.grouping.groups) for setup in found}) > 1:
        *_, largest = groupings(options.parallel, options.ep_size, worlds[0], None)
        found = _in_groups(checkpoint, options, worlds, tokens, largest)
    return found


def _in_groups(
    checkpoint: Checkpoint,
    options: Options,
    worlds: Sequence[World],
    tokens: int,
    grouping: Grouping | None,
) -> list[Setup]:
    preferred, *_ = groupings(options.parallel, options.ep_size, worlds[0], None)
    by_place: dict[tuple[int, int, int], Setup] = {}
    for world in worlds:
        place = _place(grouping or preferred, world)
        if place not in by_place:
            by_place[place] = set_up(
                checkpoint, options, world=world, tokens=tokens, grouping=grouping
            )
    return [by_place[_place(grouping or preferred, world)] for world in worlds]


def _place(grouping: Grouping, world: World) -> tuple[int, int, int]:
    """Return what a rank's share depends on: its place in its group, and who is beside it."""
    group = grouping.of(world.rank)
    return group.index(world.rank), len(group), world.local_size
