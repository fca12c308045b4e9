"""What is known of a job before it runs: samples and groups of its ranks, and what they send."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from operator import add
from types import MappingProxyType
from typing import NamedTuple

from lfm2kit import specs
from lfm2kit.formats import F32, Format
from lfm2kit.ranks.groups import Grouping
from lfm2kit.rewrites import OwnersOf, owners_among
from lfm2kit.simulating.routing import Routing
from lfm2kit.simulating.sendings import Sendings, gathered
from lfm2kit.transport import ExchangeCounts, Owners, Sent, Traffic, held_by_all, share

OwnersBySize = Callable[[int], OwnersOf | None]


def evenly_owned(size: int) -> None:
    """Return nothing that says who holds which expert: they are shared out in order."""


class Layout(NamedTuple):
    """How the ranks of a job share out samples and experts."""

    nodes: Sequence[int]  # the machine of each rank, [ranks]
    grouping: Grouping
    batch_size: int  # samples of a rank in a forward


@dataclass(frozen=True, slots=True)
class Job:
    """The forwards of some samples on the ranks of a layout."""

    layout: Layout
    samples: int
    traffic: Mapping[int, Traffic]  # among all ranks, by layer
    peers: Sequence[int]  # how many other ranks there are in each one's group, [ranks]

    @classmethod
    def of(
        cls,
        model: specs.Model,
        layout: Layout,
        samples: int,
        owners_of: OwnersBySize = evenly_owned,
        row_formats: Mapping[int, Format] = MappingProxyType({}),
    ) -> Job:
        """Return the job that runs `model`; `owners_of` shares out experts in groups of a size.

        `row_formats` are those in which the experts of layers read rows, F32 where there is none.
        """
        groups = layout.grouping.groups
        tables = {n: owners_among(model, n, owners_of(n)) for n in {len(g) for g in groups}}
        sizes = {rank: len(group) for group in groups for rank in group}
        traffic = {
            i: Traffic(
                spec.hidden_size,
                spec.num_experts_per_tok,
                _of_all(groups, {n: table[i] for n, table in tables.items()}),
                row_formats.get(i, F32),
            )
            for i, spec in experts_of(model)
        }
        return cls(layout, samples, traffic, [sizes[r] - 1 for r in range(len(sizes))])

    @property
    def ranks(self) -> int:
        return len(self.layout.nodes)

    def samples_of(self, rank: int) -> range:
        return share(self.samples, self.ranks, rank)

    def experts_held(self, layer: int) -> list[int]:
        """Return how many of a layer's experts each rank holds, [ranks]."""
        return list(map(len, held_by_all(self.traffic[layer].owners)))

    def forwards(self) -> Iterator[list[range]]:
        """Yield the samples of each rank in each forward, [ranks]; every rank makes them all."""
        size = self.layout.batch_size
        mine = [self.samples_of(rank) for rank in range(self.ranks)]
        for start in range(0, max(map(len, mine)), size):
            yield [one[start : start + size] for one in mine]

    def sendings(self, routing: Routing, layer: int, samples: Sequence[range]) -> Sendings:
        """Return what ranks send each other in a layer of a forward."""
        ids = [routing.of(layer, mine) for mine in samples]
        return Sendings.of(ids, self.traffic[layer], self.peers)

    def counts(self, routing: Routing) -> list[dict[int, ExchangeCounts]]:
        """Return what each rank's exchange counts in each layer, all forwards together, [ranks].

        A rank that is alone in its group has no exchange.
        """
        forwards = list(self.forwards())
        by_layer = {
            layer: [self.sendings(routing, layer, samples).counts() for samples in forwards]
            for layer in self.traffic
        }
        return [
            {
                layer: reduce(add, (counts[rank] for counts in of_forwards))
                for layer, of_forwards in by_layer.items()
                if self.peers[rank]
            }
            for rank in range(self.ranks)
        ]

    def gathered(self, vocab_size: int) -> list[Sent]:
        """Return what each rank sends when the logits of all forwards are gathered, [ranks]."""
        of_forwards = [gathered(list(map(len, some)), vocab_size) for some in self.forwards()]
        return [reduce(add, of_rank) for of_rank in zip(*of_forwards, strict=True)]


def experts_of(model: specs.Model) -> Iterator[tuple[int, specs.Experts]]:
    """Yield the experts of each layer that has some, with its number."""
    for i, layer in enumerate(model.layers):
        for leaf in specs.leaves(layer):
            if isinstance(leaf, specs.Experts):
                yield i, leaf


def _of_all(groups: Sequence[Sequence[int]], tables: Mapping[int, Owners]) -> Owners:
    """Return who computes each expert for whom among all ranks: `tables`, by a group's size."""
    owners: dict[int, tuple[int, ...]] = {}
    for group in groups:
        in_group = cache(lambda row, group=group: tuple(group[owner] for owner in row))
        owners |= {r: in_group(row) for r, row in zip(group, tables[len(group)], strict=True)}
    return tuple(owners[rank] for rank in range(len(owners)))
