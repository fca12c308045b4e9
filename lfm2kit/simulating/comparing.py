"""Predicts jobs in every layout, and says which one wins and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from lfm2kit import specs
from lfm2kit.building.load import Load
from lfm2kit.measuring.running import default_batch_size
from lfm2kit.ranks.balancing import owners_by
from lfm2kit.ranks.groups import DP, EP, Grouping, groupings
from lfm2kit.rewrites import OwnersOf
from lfm2kit.simulating.jobs import Job, Layout
from lfm2kit.simulating.predicting import Done, Machine, Parts, Predicted, nothing, predict
from lfm2kit.simulating.request import IN_ORDER, Request
from lfm2kit.simulating.routing import Routing, drawn
from lfm2kit.transport import World

EP_IN_NODE = "ep in a machine, dp between"
ONE = "one rank"
NAMES = {
    "compute": "computation",
    "waiting": "waiting for slower ranks",
    "exchange": "the exchange",
    "copies": "copies of rows",
    "gather": "the gather of logits",
}


@dataclass(frozen=True, slots=True)
class Simulated:
    """A job in a layout, and what is predicted for it."""

    ranks: int
    n: int
    name: str  # of the layout
    predicted: Predicted
    fits: bool  # whether the weights fit into the memory that a rank may take

    @property
    def samples_per_second(self) -> float:
        return self.n / self.predicted.seconds


@dataclass(frozen=True, slots=True)
class Compared:
    """The same samples on the same ranks in all layouts."""

    jobs: Sequence[Simulated]

    @property
    def best(self) -> Simulated | None:
        """Return the fastest of the jobs that fit; None if none does."""
        fitting = [job for job in self.jobs if job.fits]
        return max(fitting, key=lambda job: job.samples_per_second, default=None)

    def why(self) -> str:
        """Say why the best one wins, in words."""
        best = self.best
        if best is None:
            return "no layout fits into the memory of a rank"
        others = [job for job in self.jobs if job is not best and job.fits]
        if not others:
            return "the only layout" + (" that fits" if len(self.jobs) > 1 else "")
        second = max(others, key=lambda job: job.samples_per_second)
        ratio = best.samples_per_second / second.samples_per_second
        more = _more(best.predicted.parts, second.predicted.parts)
        name, seconds = max(more.items(), key=lambda item: item[1])
        return f"{ratio:.2f}x '{second.name}', which spends {1e3 * seconds:.3g} ms more on {name}"


@dataclass(frozen=True)
class Simulation:
    """What the jobs of a request have in common."""

    model: specs.Model
    request: Request
    machine: Machine
    load: Load | None
    replicas: int = 0
    ep_size: int | None = None  # of groups that are compared as well, where ranks can form them

    @property
    def work(self) -> int:
        """Return how many layers there are to predict, of all ranks and in all jobs together."""
        request, of_rank = self.request, 0
        for ranks in request.ranks:
            forwards = sum(-(-n // (ranks * self._batch_size)) for n in request.n)
            of_rank += len(self._layouts(ranks)) * forwards * ranks
        return of_rank * len(self.machine.rates.layers)

    def compared(self, done: Done = nothing) -> Iterator[Compared]:
        """Yield the jobs of each number of ranks and samples; tell `done` of the `work` it did."""
        for ranks in self.request.ranks:
            for n in self.request.n:
                yield Compared(list(self._jobs(ranks, n, done)))

    def _jobs(self, ranks: int, n: int, done: Done) -> Iterator[Simulated]:
        vocab_size = self.model.lm_head.vocab_size
        for name, grouping in self._layouts(ranks).items():
            layout = Layout(self._nodes(ranks), grouping, self._batch_size)
            job = Job.of(self.model, layout, n, self._owners_of, self.machine.rates.row_formats)
            predicted = predict(job, self._routing, self.machine, vocab_size, done)
            memory = self.request.memory
            fits = memory is None or predicted.kept_bytes <= memory
            yield Simulated(ranks, n, name, predicted, fits)

    def _layouts(self, ranks: int) -> Mapping[str, Grouping]:
        return layouts(self._nodes(ranks), self.ep_size)

    def _nodes(self, ranks: int) -> list[int]:
        return [rank // self.request.per_node for rank in range(ranks)]

    @property
    def _batch_size(self) -> int:
        return default_batch_size(self.request.tokens)

    def _owners_of(self, size: int) -> OwnersOf | None:
        """Return who holds which expert in groups of a size: by the load, or in order."""
        if self.load is None or size == 1 or self.request.placement == IN_ORDER:
            return None
        return owners_by(self.load, size, self.replicas)

    @cached_property
    def _routing(self) -> Routing:
        """Return what the tokens of the most samples choose; fewer samples are its first ones."""
        return drawn(self.model, self.load, max(self.request.n), self.request.tokens)


def layouts(nodes: Sequence[int], ep_size: int | None = None) -> Mapping[str, Grouping]:
    """Return the different layouts of ranks on these machines, [ranks], by name.

    Groups of `ep_size` ranks are among them if the ranks can form them.
    """
    world = World.of_all(nodes)[0]
    if world.size == 1:
        return {ONE: groupings(DP, None, world, None)[0]}
    asked: dict[str, tuple[str, int | None]]
    asked = {DP: (DP, None), EP: (EP, world.size), EP_IN_NODE: (EP, None)}
    if ep_size is not None and world.size % ep_size == 0:
        asked[f"ep in groups of {ep_size}"] = EP, ep_size
    found: dict[str, Grouping] = {}
    for name, (parallel, size) in asked.items():
        grouping = groupings(parallel, size, world, None)[0]
        if grouping not in found.values():
            found[name] = grouping
    return found


def _more(best: Parts, other: Parts) -> dict[str, float]:
    """Return the seconds that another layout spends more on each part."""
    both = zip(Parts._fields, best, other, strict=True)
    return {NAMES[name]: theirs - ours for name, ours, theirs in both}
