"""What spans amount to: seconds of each block and kind, beside the least that its work takes."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lfm2kit import specs
from lfm2kit.backend import Ceilings
from lfm2kit.batch import Batch
from lfm2kit.building.loading import Setup
from lfm2kit.building.placement import Placed
from lfm2kit.measuring.bench import itemsize, roofline
from lfm2kit.profiling.forwards import Profile
from lfm2kit.profiling.marks import Span, What, finest
from lfm2kit.specs import Spec, Work
from lfm2kit.transport import everyones


@dataclass(frozen=True, slots=True)
class Part:
    """A block, or a part that it tells, and the median of its seconds in a forward.

    Without a backend it is what the core does around blocks; specs count no work for that.
    """

    name: str  # "layers.3.operator"
    kind: str
    backend: str
    memory: str
    seconds: float
    work: Work

    @property
    def layer(self) -> int | None:
        words = self.name.split(".")
        return int(words[1]) if words[0] == "layers" else None

    def roofline(self, ceilings: Ceilings | None) -> float | None:
        """Return the share of what the ceilings allow: the least time over the time it took."""
        return roofline(self.work, self.seconds, ceilings) if self.backend else None


def parts_of(setup: Setup, profile: Profile, batch: Batch) -> list[Part]:
    """Return the blocks of a profile in the order of the forward, or their parts if they tell.

    What the core does around blocks comes behind them: exchanges between ranks, and waits.
    Every rank of a group that shares experts calls this with its own batch.
    """
    given = _Given.of(setup, batch)
    leaves = {leaf.name: leaf for leaf in setup.placed.leaves()}
    taken: dict[tuple[What, str], list[float]] = {}
    for forward in profile.spans:
        for key, seconds in _summed(forward).items():
            taken.setdefault(key, []).append(seconds)
    order = {key: _order(key[0], list(leaves)) for key in taken}
    return [
        _part(setup, leaves.get(what.block), what, memory, statistics.median(seconds), given)
        for (what, memory), seconds in sorted(taken.items(), key=lambda one: order[one[0]])
    ]


class _Given(NamedTuple):
    """What blocks work on: a rank's batch, and the tokens of all ranks that share its experts."""

    batch: Batch
    ranks: int
    tokens: int

    @classmethod
    def of(cls, setup: Setup, batch: Batch) -> _Given:
        if setup.among is None:
            return cls(batch, 1, batch.tokens)
        tokens = everyones(setup.among, batch.tokens)
        return cls(batch, len(tokens), int(tokens.sum()))

    def work(self, spec: Spec, itemsize: float) -> Work:
        experts, *others = specs.leaves(spec)
        if others or not isinstance(experts, specs.Experts) or _is_whole(experts):
            return spec.work(self.batch, itemsize)
        return experts.work_among(self.ranks, self.tokens, itemsize)


def _is_whole(experts: specs.Experts) -> bool:
    """Return whether all experts are here, so that no token of another rank comes."""
    return len(experts.local_experts) == experts.num_experts


def _order(what: What, leaves: Sequence[str]) -> int:
    """Return the place of a block's last leaf: exchanges and waits are of joined blocks as well."""
    inside = (i for i, name in enumerate(leaves) if f"{name}.".startswith(f"{what.block}."))
    return max(inside, default=len(leaves))


def _summed(spans: Iterable[Span]) -> dict[tuple[What, str], float]:
    """Return the seconds of one forward by what takes them, and the memory."""
    found: dict[tuple[What, str], float] = {}
    for span in finest(spans):
        key = span.what, span.memory
        found[key] = found.get(key, 0.0) + span.own
    return found


def _part(
    setup: Setup, placed: Placed | None, what: What, memory: str, seconds: float, given: _Given
) -> Part:
    if what.kind or placed is None:
        return Part(what.name, what.kind, "", memory, seconds, Work(0, 0))
    spec = _spec_at(placed.spec, what.part)
    work = given.work(spec, itemsize(setup, placed))
    return Part(what.name, spec.kind, placed.backend or "", memory, seconds, work)


def _spec_at(spec: Spec, path: str) -> Spec:
    """Return the spec of a part by its path of roles; the whole one if there is none."""
    for role in filter(None, path.split(".")):
        inner = next((part.spec for part in spec.parts() if part.role == role), None)
        if inner is None:
            return spec
        spec = inner
    return spec


@dataclass(frozen=True, slots=True)
class Total:
    """All blocks of a kind that one backend builds."""

    kind: str
    backend: str
    blocks: int
    seconds: float
    work: Work
    roofline: float | None


def totals(parts: Sequence[Part], ceilings: Ceilings | None) -> Iterator[Total]:
    """Yield the kinds of blocks, the one that takes longest first."""
    groups: dict[tuple[str, str], list[Part]] = {}
    for part in parts:
        groups.setdefault((part.kind, part.backend), []).append(part)
    for (kind, backend), some in sorted(
        groups.items(), key=lambda item: -sum(part.seconds for part in item[1])
    ):
        seconds = sum(part.seconds for part in some)
        work = sum((part.work for part in some), Work(0, 0))
        share = roofline(work, seconds, ceilings) if backend else None
        yield Total(kind, backend, len(some), seconds, work, share)
