"""Decides which ranks share out a model's experts among themselves: the groups of a job.

Samples are shared out over all ranks, and each group holds all experts.  Which group a rank is in
follows from the machines that ranks are on, and not from how a launcher numbers the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from lfm2kit.errors import Lfm2kitError, Option
from lfm2kit.transport import FormsGroups, Transport, World

EP, DP, AUTO = "ep", "dp", "auto"
PARALLEL = (EP, DP, AUTO)
NO_GROUPS = "the transport forms no groups of ranks"
NO_ROOM = "one machine's ranks have too little memory for all of them"


class Grouping(NamedTuple):
    """The groups of a job, each rank in one of them, and why they are not smaller, if that is new.

    Rank i of a group is its i-th number.
    """

    groups: tuple[tuple[int, ...], ...]
    note: str | None = None

    def of(self, rank: int) -> tuple[int, ...]:
        """Return the group that `rank` is in."""
        return next(group for group in self.groups if rank in group)

    def place(self, world: World, transport: Transport | None) -> tuple[World, Transport | None]:
        """Return a rank's place in its group, and the group's transport.

        Those of a process alone if it is in a group of one.
        """
        ranks = self.of(world.rank)
        if len(ranks) == 1:
            return World(), None
        if len(ranks) == world.size:
            return world, transport
        return world.within(ranks), None if transport is None else _formed(transport).group(ranks)

    def __str__(self) -> str:
        sizes = sorted({len(group) for group in self.groups})
        if sizes == [1]:
            return "each holds all experts"
        return f"experts in groups of {' and '.join(map(str, sizes))}"

    @property
    def has_parts(self) -> bool:
        """Return whether there is a group that is neither one rank nor all ranks."""
        return 1 < len(self.groups) < sum(map(len, self.groups))


def groupings(
    parallel: str, ep_size: int | None, world: World, transport: Transport | None
) -> list[Grouping]:
    """Return what `first_fitting` chooses from, smaller groups first.

    Without a transport, groups are only planned.  Raise `Lfm2kitError` if the ranks cannot form
    groups of `ep_size`.
    """
    everyone = Grouping((tuple(range(world.size)),))
    if parallel == DP:
        return [each_alone(world)]
    if ep_size is not None:
        check_ep_size(ep_size, world.size)
        asked = _in_groups_of(ep_size, world)
        if asked.has_parts and not _forms_groups(transport):
            both = Option("ep_size", world.size), " or ", Option("parallel", DP)
            raise Lfm2kitError(Option("ep_size", ep_size), f": {NO_GROUPS}; try ", *both)
        return [asked]
    on_nodes = _on_nodes(world)
    if len(on_nodes.groups) == 1 or (parallel == EP and not on_nodes.has_parts):
        return [everyone]
    over_all = f"experts are shared out over all {world.size} ranks: "
    if on_nodes.has_parts and not _forms_groups(transport):
        return [everyone._replace(note=f"{over_all}{NO_GROUPS}")]
    return [on_nodes, everyone._replace(note=f"{over_all}{NO_ROOM}")]


def each_alone(world: World) -> Grouping:
    """Return the grouping in which each rank holds all experts."""
    return _in_groups_of(1, world)


def first_fitting(asked: Sequence[Grouping], fits: Callable[[Grouping], bool]) -> Grouping:
    """Return the first of `asked` in which every share fits, else the last.

    `fits` says of one of them whether the shares of all ranks that are known do.
    """
    return next((one for one in asked[:-1] if fits(one)), asked[-1])


def check_ep_size(ep_size: int, ranks: int) -> None:
    """Raise `Lfm2kitError` if `ranks` ranks cannot form groups of `ep_size`."""
    if ranks % ep_size == 0:
        return
    if ranks == 1:
        raise Lfm2kitError(Option("ep_size", ep_size), ": there is only one rank; start more")
    nearest = max(size for size in range(1, min(ep_size, ranks) + 1) if ranks % size == 0)
    cannot = f": {ranks} ranks cannot form groups of {ep_size}; try "
    raise Lfm2kitError(Option("ep_size", ep_size), cannot, Option("ep_size", nearest))


def _in_groups_of(size: int, world: World) -> Grouping:
    """Return groups of `size` ranks, on as few machines as possible."""
    order = [rank for group in _on_nodes(world).groups for rank in group]
    if size == world.size:
        order.sort()
    parts = (order[start : start + size] for start in range(0, world.size, size))
    return Grouping(tuple(sorted(map(tuple, parts))))


def _on_nodes(world: World) -> Grouping:
    """Return a group for each machine; a transport that does not know them has one."""
    ranks: dict[int, list[int]] = {}
    for rank, node in enumerate(world.nodes or (0,) * world.size):
        ranks.setdefault(node, []).append(rank)
    return Grouping(tuple(map(tuple, ranks.values())))


def _forms_groups(transport: Transport | None) -> bool:
    return transport is None or isinstance(transport, FormsGroups)


def _formed(transport: Transport) -> FormsGroups:
    assert isinstance(transport, FormsGroups)  # `groupings` has seen to it
    return transport
