"""Says which blocks of a plan nobody builds, and finds a plan in which somebody does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, groupby
from typing import NamedTuple

from lfm2kit import specs
from lfm2kit.backend import Backend
from lfm2kit.building.answers import Answers
from lfm2kit.building.plan import PARTS_OF_EXPERTS, Plan, Rule
from lfm2kit.rewrites import ids_in_words
from lfm2kit.specs import Spec

# The backend of each block by its kind and its layer, which is None outside the layers.
Assigned = Mapping[str, Mapping[int | None, str]]
GROUPS = {"router": ("scores", "choice"), "moe": ("router", "experts")}


class Lacking(NamedTuple):
    """A block that the plan gives to a backend which does not build it."""

    name: str
    spec: Spec
    kind: str  # by which the plan names it
    layer: int | None  # None: outside the layers
    backend: str
    reason: str


def can_build(create: Callable[[str], Backend], name: str, spec: Spec) -> bool:
    """Return whether a backend builds a spec; one that cannot run here, or is broken, does not."""
    try:
        return Answers(create(name), name).why_unsupported(spec) is None
    except Exception:
        return False


def in_words(lacking: Sequence[Lacking]) -> str:
    """Return a sentence about all of these blocks: their kinds, layers, backends and reasons."""
    if len(lacking) == 1:
        one = lacking[0]
        spec = type(one.spec).__name__
        return f"{one.name}: backend '{one.backend}' has no {spec} block ({one.reason})"
    by_backend = _by(lambda one: one.backend, lacking)
    return "; ".join(f"backend '{name}' lacks {_blocks(some)}" for name, some in by_backend.items())


def _blocks(lacking: Sequence[Lacking]) -> str:
    """Return "embed, conv of layers 0-3, 5 (it builds only MLP)", with each reason once."""
    by_reason = _by(lambda one: one.reason, lacking)
    return ", and ".join(f"{_kinds(some)} ({reason})" for reason, some in by_reason.items())


def _kinds(lacking: Sequence[Lacking]) -> str:
    return ", ".join(_places(kind, some) for kind, some in _by(_called, lacking).items())


def _by(key: Callable[[Lacking], str], lacking: Sequence[Lacking]) -> dict[str, list[Lacking]]:
    found: dict[str, list[Lacking]] = {}
    for one in lacking:
        found.setdefault(key(one), []).append(one)
    return found


def _called(one: Lacking) -> str:
    """Return the kind of a block, or its spec if a rewrite has put that there."""
    spec = type(one.spec)
    return one.kind if spec.__module__ == specs.__name__ else spec.__name__


def _places(kind: str, lacking: Sequence[Lacking]) -> str:
    """Return "conv of layers 0-3, 5"; the places outside the layers have names."""
    layers = sorted({one.layer for one in lacking if one.layer is not None})
    outside = [one.name for one in lacking if one.layer is None]
    if not layers:
        return kind
    many = "layer" if len(layers) == 1 else "layers"
    of_layers = f"{kind} of {many} {ids_in_words.ranges(layers)}"
    return " and ".join([of_layers, *outside])


def plan_without(
    plan: Plan,
    lacking: Sequence[Lacking],
    assigned: Assigned,
    names: Iterable[str],
    can_build: Callable[[str, Spec], bool],
    can_place: Callable[[Plan], bool],
) -> Plan | None:
    """Return a plan of few rules that `can_place`, in which others of `names` get what is lacking.

    Return None if there is no such plan.

    `assigned` is what `plan` says.  All other blocks keep their backends, and rules for parts that
    experts may have later stay.
    """
    wanted = {kind: dict(places) for kind, places in assigned.items()}
    for one in lacking:
        able = (name for name in (plan.default, *names) if can_build(name, one.spec))
        if (name := next(able, None)) is None or one.kind not in wanted:
            return None
        wanted[one.kind][one.layer] = name
    later = [rule for rule in plan.rules if rule.kind in PARTS_OF_EXPERTS - wanted.keys()]
    defaults = [plan.default, *(name for places in wanted.values() for name in places.values())]
    found = (_plan(default, wanted, later) for default in dict.fromkeys(defaults))
    by_length = sorted(found, key=lambda one: len(one.rules))
    return next((one for one in by_length if can_place(one)), None)


def _plan(default: str, assigned: Assigned, later: Sequence[Rule]) -> Plan:
    """Return a plan with this default that gives each block its backend."""
    rules = (_rules(kind, places, default) for kind, places in _grouped(assigned).items())
    return Plan(default, (*chain.from_iterable(rules), *later))


def _grouped(assigned: Assigned) -> Assigned:
    """Return the same with one kind for several whose blocks have the same backends."""
    grouped = dict(assigned)
    for group, (first, second) in GROUPS.items():
        if first in grouped and grouped[first] == grouped.get(second):
            del grouped[second]
            grouped = {group if kind == first else kind: it for kind, it in grouped.items()}
    return grouped


def _rules(kind: str, places: Mapping[int | None, str], default: str) -> Iterator[Rule]:
    """Yield the rules for the blocks of a kind in a plan with this default."""
    counts = Counter(places.values())
    base = places.get(None) or max(counts, key=lambda name: (counts[name], name == default))
    if base != default:
        yield Rule(base, kind)
    layers = sorted(layer for layer in places if layer is not None)
    for backend, run in groupby(layers, key=places.__getitem__):
        there = list(run)
        if backend != base:
            yield Rule(backend, kind, range(there[0], there[-1] + 1))
