"""Specs of a layer's experts in several parts, each of which is a block of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

from lfm2kit.batch import Batch
from lfm2kit.building.plan import HOST_EXPERTS, STREAMED_EXPERTS
from lfm2kit.errors import Lfm2kitError
from lfm2kit.rewrites import ids_in_words
from lfm2kit.specs import Experts, Part, Spec, Work


class Places(NamedTuple):
    """Where a layer's experts are computed: ids that are in neither are resident."""

    streamed: tuple[int, ...] = ()
    host: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StreamedExperts(Spec):
    """(x, expert_ids, expert_weights) -> delta, as `Experts`, whose weights need not stay here.

    A backend that builds it keeps the weights in the host's memory and copies them here for each
    call, into slots that all such blocks of a model share.  So it can copy the next block's while
    this one's are used.  Blocks are built, and called in every forward, in the order of `position`.
    A backend that does not know this spec is asked for the `Experts` inside.
    """

    experts: Experts
    position: int  # among the model's streamed experts, in the order of the forward: 0, 1, ...
    slots: int  # that all of the model's streamed experts pass through
    experts_per_slot: int  # at most, which are copied at once
    kind: ClassVar[str] = STREAMED_EXPERTS

    @property
    def portions(self) -> tuple[tuple[int, ...], ...]:
        """Return the ids of experts that are in a slot together, in the order of their copies."""
        ids, each = self.experts.local_experts, self.experts_per_slot
        return tuple(ids[i : i + each] for i in range(0, len(ids), each))

    def parts(self) -> tuple[Part, ...]:
        return (Part("experts", "", self.experts),)


@dataclass(frozen=True, slots=True)
class SplitExperts(Spec):
    """(x, expert_ids, expert_weights) -> delta, as `Experts`, in one part or several.

    delta is the sum of the parts' deltas, in the order resident, streamed, host.
    """

    experts: Experts  # all that are here
    places: Places
    position: int = 0  # of the streamed ones, as the fields below: see `StreamedExperts`
    slots: int = 1
    experts_per_slot: int = 1
    kind: ClassVar[str] = "experts"

    def __post_init__(self) -> None:
        twice = set(self.places.streamed) & set(self.places.host)
        if twice:
            raise Lfm2kitError(f"{ids_in_words.experts(sorted(twice))} are streamed and the host's")

    @property
    def resident(self) -> tuple[int, ...]:
        elsewhere = {*self.places.streamed, *self.places.host}
        return tuple(e for e in self.local_experts if e not in elsewhere)

    @property
    def streamed(self) -> tuple[int, ...]:
        return _both(self.places.streamed, self.local_experts)

    @property
    def host(self) -> tuple[int, ...]:
        return _both(self.places.host, self.local_experts)

    @property
    def hidden_size(self) -> int:
        return self.experts.hidden_size

    @property
    def num_experts(self) -> int:
        return self.experts.num_experts

    @property
    def num_experts_per_tok(self) -> int:
        return self.experts.num_experts_per_tok

    @property
    def local_experts(self) -> tuple[int, ...]:
        return self.experts.local_experts

    def parts(self) -> tuple[Part, ...]:
        streamed = StreamedExperts(
            self._only(self.streamed), self.position, self.slots, self.experts_per_slot
        )
        parts = (
            (self.resident, Part("resident", "", self._only(self.resident))),
            (self.streamed, Part("streamed", "", streamed, STREAMED_EXPERTS)),
            (self.host, Part("host", "", self._only(self.host), HOST_EXPERTS)),
        )
        return tuple(part for ids, part in parts if ids)

    def work(self, batch: Batch, itemsize: float = 4) -> Work:
        return self.experts.work(batch, itemsize)

    def note(self) -> str:
        """Return "experts 0-19 resident, 28-31 streamed, 20-27 host"."""
        ids = {"resident": self.resident, "streamed": self.streamed, "host": self.host}
        where = (f"{ids_in_words.ranges(some)} {role}" for role, some in ids.items() if some)
        return f"experts {', '.join(where)}"

    def _only(self, ids: tuple[int, ...]) -> Experts:
        return replace(self.experts, local_experts=ids)


def _both(ids: tuple[int, ...], local: tuple[int, ...]) -> tuple[int, ...]:
    """Return the ids that are local as well."""
    here = set(local)
    return tuple(e for e in ids if e in here)
