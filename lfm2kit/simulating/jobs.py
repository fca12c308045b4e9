"""What is known of a job before it runs: samples and groups of its ranks, and what they send."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import NamedTuple

from lfm2kit import specs
from lfm2kit.ranks.groups import Grouping
from lfm2kit.rewrites import OwnersOf, owners_among
from lfm2kit.simulating.routing import Routing
from lfm2kit.simulating.sendings import Sendings, gathered
from lfm2kit.transport import ExchangeCounts, Owners, Sent, Traffic, share


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
    owners: Mapping[int, Mapping[int, Owners]]  # by the size of a group, and by layer
    experts: Mapping[int, specs.Experts]  # by layer

    @classmethod
    def of(
        cls,
        model: specs.Model,
        layout: Layout,
        samples: int,
        owners_of: Mapping[int, OwnersOf] | None = None,
    ) -> Job:
        """Return the job that runs `model`; `owners_of` shares out experts, by a group's size."""
        sizes = {len(group) for group in layout.grouping.groups}
        by_load = owners_of or {}
        owners = {size: owners_among(model, size, by_load.get(size)) for size in sorted(sizes)}
        return cls(layout, samples, owners, dict(_experts(model)))

    @property
    def ranks(self) -> int:
        return len(self.layout.nodes)

    def samples_of(self, rank: int) -> range:
        return share(self.samples, self.ranks, rank)

    def forwards(self) -> Iterator[list[range]]:
        """Yield the samples of each rank in each forward, [ranks]; every rank makes them all."""
        size = self.layout.batch_size
        mine = [self.samples_of(rank) for rank in range(self.ranks)]
        for start in range(0, max(map(len, mine)), size):
            yield [one[start : start + size] for one in mine]

    def sendings(self, routing: Routing, layer: int, samples: Sequence[range]) -> list[Sendings]:
        """Return what the ranks of each group send each other in a layer of a forward."""
        found = []
        for group in self.layout.grouping.groups:
            spec, owners = self.experts[layer], self.owners[len(group)][layer]
            traffic = Traffic(spec.hidden_size, spec.num_experts_per_tok, owners)
            ids = [routing.of(layer, samples[rank]) for rank in group]
            found.append(Sendings.of(ids, traffic))
        return found

    def counts(self, routing: Routing) -> list[dict[int, ExchangeCounts]]:
        """Return what each rank's exchange counts in each layer, all forwards together, [ranks].

        A rank that is alone in its group has no exchange.
        """
        everyones: list[dict[int, list[ExchangeCounts]]] = [{} for _ in range(self.ranks)]
        for samples in self.forwards():
            for layer in self.experts:
                sendings = self.sendings(routing, layer, samples)
                for group, sent in zip(self.layout.grouping.groups, sendings, strict=True):
                    for rank, counts in zip(group, sent.counts(), strict=True):
                        if len(group) > 1:
                            everyones[rank].setdefault(layer, []).append(counts)
        return [{layer: reduce(add, all_) for layer, all_ in one.items()} for one in everyones]

    def gathered(self, vocab_size: int) -> list[Sent]:
        """Return what each rank sends when the logits are gathered, [ranks]."""
        return gathered([len(self.samples_of(r)) for r in range(self.ranks)], vocab_size)


def _experts(model: specs.Model) -> Iterator[tuple[int, specs.Experts]]:
    for i, layer in enumerate(model.layers):
        for leaf in specs.leaves(layer):
            if isinstance(leaf, specs.Experts):
                yield i, leaf
