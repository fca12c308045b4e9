"""Decides by a recorded load which ranks hold each expert, so that all have equal work.

Experts that are held by every rank of a group are computed by each rank for its own tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from lfm2kit.building.load import Load
from lfm2kit.errors import Lfm2kitError, Option
from lfm2kit.transport import Owners


def owners_by(load: Load, size: int, replicas: int) -> Callable[[int, int], Owners]:
    """Return a function that returns the owners of a layer's experts in a group of `size` ranks.

    It takes the layer's number and how many experts it has, and raises `Lfm2kitError` if the load
    has another number for it.  `replicas` experts of each layer are on every rank.
    """
    counts = {layer.layer: layer.counts for layer in load.layers}

    def owners_of(layer: int, num_experts: int) -> Owners:
        if len(counts.get(layer, ())) != num_experts:
            rewritten = f"layer {layer} has {num_experts} experts after the rewrites of the model"
            raise Lfm2kitError(Option("load"), f": {rewritten}; leave these out, or the load")
        return balanced(counts[layer], size, replicas)

    return owners_of


def check_replicas(replicas: int, load: Load) -> None:
    """Raise `Lfm2kitError` if no layer of the load's model has as many experts as `replicas`."""
    most = max((len(layer.counts) for layer in load.layers), default=0)
    if replicas > most:
        there = f": the model has {most} experts in a layer; try "
        asked = Option("replicate_experts", replicas)
        raise Lfm2kitError(asked, there, Option("replicate_experts", most))


def balanced(load: Sequence[int], size: int, replicas: int = 0) -> Owners:
    """Return the owners of a layer's experts, of which `load`, [num_experts], tokens chose each.

    The `replicas` experts that are chosen most are on every rank.  Each of the others, those that
    are chosen more first, is on the rank with the fewest rows up to then; no rank holds more of
    them than if they were shared out evenly.
    """
    hottest = sorted(range(len(load)), key=lambda e: (-load[e], e))
    others = hottest[replicas:]
    most = -(-len(others) // size)
    owner: dict[int, int] = {}
    rows, held = [0] * size, [0] * size
    for e in others:
        free = (rank for rank in range(size) if held[rank] < most)
        owner[e] = least = min(free, key=lambda rank: (rows[rank], held[rank], rank))
        rows[least] += load[e]
        held[least] += 1
    return tuple(tuple(owner.get(e, rank) for e in range(len(load))) for rank in range(size))


def expected_rows(load: Sequence[int], owners: Owners) -> list[float]:
    """Return the rows of each rank, [ranks], if each rank has the same part of the load."""
    rows = [0.0] * len(owners)
    for ranks in owners:
        for count, owner in zip(load, ranks, strict=True):
            rows[owner] += count / len(owners)
    return rows


def max_over_mean(layers: Iterable[Sequence[float]]) -> float | None:
    """Return the rows of each layer's busiest rank over those of an average one.

    `layers` are the rows of each rank, [layers][ranks].  None if there are no rows.
    """
    rows = list(layers)
    total = sum(map(sum, rows))
    return sum(map(max, rows)) * len(rows[0]) / total if total else None
