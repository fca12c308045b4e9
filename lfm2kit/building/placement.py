"""Resolves a plan over a model: every block's backend and memory, before a weight is touched.

The largest spec is asked for first: a backend that builds whole layers gets them whole, or all but
some parts that lie elsewhere; one that does neither is asked for the layer's parts, which the core
joins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from lfm2kit import specs
from lfm2kit.backend import Backend, BuildsAround, Crosses
from lfm2kit.building.answers import Answers
from lfm2kit.building.joins import Join, Joins
from lfm2kit.building.lacking import Lacking, can_build, in_words, plan_without
from lfm2kit.building.plan import Plan
from lfm2kit.errors import Lfm2kitError, Option
from lfm2kit.formats import F32, Format
from lfm2kit.memory import Memory
from lfm2kit.specs import Spec
from lfm2kit.transport import ExchangeOffer

# Why a block that lives in another memory is not called from there by a crossing.
NO_CROSSER = "no backend of the plan calls blocks of another memory"
JOINED = "it consists of several blocks"


@dataclass(frozen=True, slots=True)
class Placed:
    """A spec with its place: built by `backend`, or (None) joined by the core from `parts`.

    A backend may build it around `parts` that are computed elsewhere.
    """

    name: str  # "layers.2.feed_forward"
    scope: str  # of its weights in the checkpoint's names
    spec: Spec
    memory: Memory
    outer: Memory  # of its surroundings; a copy is made where the two differ
    backend: str | None
    parts: tuple[tuple[str, Placed], ...] = ()  # by role, or by path of roles in a built one
    join: Join | None = None  # of the parts
    crosser: str | None = None  # the backend that calls it from `outer`, captured or not
    why_no_crosser: str | None = None  # of a block without parts that lives elsewhere
    why_not_captured: str | None = None  # its backend's reason, if no crossing calls it

    @property
    def is_copied(self) -> bool:
        return self.memory.name != self.outer.name

    def leaves(self) -> Iterator[Placed]:
        """Yield the blocks that backends build, in the order of the forward."""
        if self.backend is not None:
            yield self
        for _, part in self.parts:
            yield from part.leaves()

    def copies(self) -> int:
        """Return how many blocks of the tree take their arrays from another memory."""
        return int(self.is_copied) + sum(part.copies() for _, part in self.parts)

    @property
    def why_not_crossed(self) -> str | None:
        """Return why `outer` waits for copies around this block; None if it does not."""
        return JOINED if self.parts and self.is_copied else self.why_no_crosser

    def tree(self) -> Iterator[Placed]:
        """Yield this block and all that it is joined of."""
        yield self
        for _, part in self.parts:
            yield from part.tree()

    def offers(self) -> list[ExchangeOffer]:
        """Return the exchanges in joined blocks, each once, in the order of the forward."""
        joins = (placed.join for placed in self.tree())
        offers = (join.offer for join in joins if join is not None)
        return list({id(offer): offer for offer in offers if offer is not None}.values())

    @property
    def is_capturable(self) -> bool:
        """Return whether a forward can be captured: no copy is waited for, nobody objects."""
        return not any(
            (placed.is_copied and placed.crosser is None)
            or placed.why_not_captured is not None
            or (placed.join is not None and not placed.join.is_capturable)
            for placed in self.tree()
        )

    def objections(self) -> Iterator[str]:
        """Yield a sentence for each backend and reason that prevent a capture."""
        names: dict[tuple[str | None, str], list[str]] = {}
        for leaf in self.leaves():
            if leaf.why_not_captured is not None:
                names.setdefault((leaf.backend, leaf.why_not_captured), []).append(leaf.name)
        for (backend, reason), (first, *others) in names.items():
            more = f" and {len(others)} more" if others else ""
            yield f"not captured: {backend} builds {first or 'the model'}{more}: {reason}"


class _Where(NamedTuple):
    """What a plan goes by inside a spec: the layer, and the kind that a part has been given."""

    layer: int | None = None
    kind: str | None = None


@dataclass(frozen=True, slots=True)
class Placer:
    """A placer of specs by `plan`; `create` gives backends, `installed` names them for errors."""

    plan: Plan
    create: Callable[[str], Backend]
    joins: Joins
    installed: Iterable[str] = ()  # the most preferred first
    _lacking: list[Lacking] = field(default_factory=list, init=False, repr=False)

    def place(self, model: specs.Model) -> Placed:
        """Return the whole model's tree; raise `Lfm2kitError` if backends lack their blocks."""
        placed, lacking = self.placed_and_lacking(model)
        if lacking:
            raise self._unsupported(model, lacking)
        return placed

    def placed_and_lacking(self, model: specs.Model) -> tuple[Placed, Sequence[Lacking]]:
        """Return the whole model's tree, and the blocks in it that their backends do not build."""
        self.plan.check(model)
        self._lacking.clear()
        home = self._ask(self.plan.default).memory(model.embed_tokens)
        return self._place("", "", model, _Where(), home), tuple(self._lacking)

    def _place(self, name: str, scope: str, spec: Spec, where: _Where, outer: Memory) -> Placed:
        backend = self._one_backend(spec, where)
        if backend is not None:
            reason = self._why_not_whole(backend, name, spec)
            if reason is None:
                memory = self._ask(backend, name).memory(spec)
                crosser, reason = self._crosser(name, spec, memory, outer)
                built = Placed(name, scope, spec, memory, outer, backend, (), None, crosser, reason)
                return self._captured_or_not(built)
            if type(spec) not in self.joins:
                kind = where.kind or spec.kind
                self._lacking.append(Lacking(name, spec, kind, where.layer, backend, reason))
                return Placed(name, scope, spec, outer, outer, backend)
        around = self._around(name, scope, spec, where, outer)
        if around is not None:
            return around
        if type(spec) not in self.joins:
            raise self._not_joined(name, spec, where)
        join = self.joins[type(spec)](outer)
        parts = tuple(
            (part.role, self._place(*_part_place(name, scope, part, inside), join.memory))
            for part, inside in _numbered(spec, where)
        )
        if join.reading is not None:
            join = join.reading({role: self._row_format(part) for role, part in parts})
        return Placed(name, scope, spec, join.memory, outer, None, parts, join)

    def _row_format(self, part: Placed) -> Format:
        """Return the format in which a part of a joined block reads rows."""
        if part.backend is None:
            return F32
        return self._ask(part.backend, part.name).row_format(part.spec)

    def _ask(self, backend: str, place: str = "") -> Answers:
        """Return what a backend answers about the block at `place`."""
        return Answers(self.create(backend), backend, place)

    def _why_not_whole(self, backend: str, name: str, spec: Spec) -> str | None:
        """Return why the backend cannot build `spec` as one block; None if it can."""
        reason = self._ask(backend, name or "the model").why_unsupported(spec)
        return self._why_not_inside(backend, spec) if reason is None else reason

    def _why_not_inside(self, backend: str, spec: Spec) -> str | None:
        """Return why the backend cannot build what rewrites have put into `spec`; None if it can.

        A backend that builds layers may not have looked whether it knows all that is in one.
        """
        put = (one for one in _inside(spec) if type(one).__module__ != specs.__name__)
        reasons = (self._ask(backend).why_unsupported(one) for one in put)
        return next((reason for reason in reasons if reason is not None), None)

    def _around(
        self, name: str, scope: str, spec: Spec, where: _Where, outer: Memory
    ) -> Placed | None:
        """Return `spec` built by one backend around parts that lie elsewhere, if one does that."""
        for backend in self._names(spec, where) if where.layer is not None else ():
            can_build = isinstance(self.create(backend), BuildsAround)
            if not can_build or self._why_not_inside(backend, spec):
                continue
            asked = self._ask(backend, name)
            memory = asked.memory(spec)
            apart = {p.role: p for p in self._apart(spec, where, backend, memory)}
            if apart and asked.why_not_around(spec, tuple(apart)) is None:
                parts = tuple(
                    (role, self._place(*_part_place(name, scope, part, where), memory))
                    for role, part in apart.items()
                )
                built = Placed(name, scope, spec, memory, outer, backend, parts)
                return self._captured_or_not(built)
        return None

    def _captured_or_not(self, built: Placed) -> Placed:
        """Return the block that a backend builds, with its reason if it prevents a capture."""
        assert built.backend is not None
        if built.crosser is not None:
            return built
        reason = self._ask(built.backend, built.name).why_not_captured(built.spec)
        return built if reason is None else replace(built, why_not_captured=reason)

    def _crosser(
        self, name: str, spec: Spec, memory: Memory, outer: Memory
    ) -> tuple[str | None, str | None]:
        """Return the backend of the plan that can call a block from `outer`, or why none can.

        Neither if the block lives there.
        """
        if memory.name == outer.name:
            return None, None
        reasons = []
        for backend in dict.fromkeys((self.plan.default, *sorted(self.plan.backends()))):
            if not isinstance(self.create(backend), Crosses):
                continue
            reason = self._ask(backend, name).why_not_crossed(spec, memory, outer)
            if reason is None:
                return backend, None
            reasons.append(f"{backend}: {reason}")
        return None, "; ".join(reasons) or NO_CROSSER

    def _apart(
        self, spec: Spec, where: _Where, backend: str, memory: Memory
    ) -> Iterator[specs.Part]:
        """Yield the largest parts of `spec` that `backend` does not compute in `memory`.

        Their roles are paths, and their scopes relative to that of `spec`.
        """
        for part in spec.parts():
            inside = _Where(where.layer, part.kind or where.kind)
            leaves = list(specs.leaves_by_kind(part.spec, inside.kind))
            theirs = sum(
                not self._is_in(leaf, _Where(where.layer, kind), backend, memory)
                for kind, leaf in leaves
            )
            if theirs == len(leaves):
                yield part._replace(kind=inside.kind)
            elif theirs:
                for inner in self._apart(part.spec, inside, backend, memory):
                    role, scope = _dotted(part.role, inner.role), _dotted(part.scope, inner.scope)
                    yield specs.Part(role, scope, inner.spec, inner.kind)

    def _is_in(self, leaf: Spec, where: _Where, backend: str, memory: Memory) -> bool:
        """Return whether the plan gives `leaf` to `backend`, which computes it in `memory`."""
        if self.plan.backend_for(where.layer, where.kind or leaf.kind) != backend:
            return False
        own = self._ask(backend)
        return own.why_unsupported(leaf) is not None or own.memory(leaf).name == memory.name

    def _names(self, spec: Spec, where: _Where) -> dict[str, None]:
        """Return the backends that the plan gives parts of `spec`, in the order of the forward."""
        leaves = specs.leaves_by_kind(spec, where.kind)
        return dict.fromkeys(self.plan.backend_for(where.layer, kind) for kind, _ in leaves)

    def _one_backend(self, spec: Spec, where: _Where) -> str | None:
        """Return the backend that the plan gives every block of `spec`; None for several."""
        if isinstance(spec, specs.Model) and self.plan.rules:
            return None
        names = self._names(spec, where)
        return next(iter(names)) if len(names) == 1 else None

    def _not_joined(self, name: str, spec: Spec, where: _Where) -> Lfm2kitError:
        backends = " and ".join(f"'{backend}'" for backend in self._names(spec, where))
        return Lfm2kitError(
            f"{name}: the plan gives parts of this {type(spec).__name__} to {backends}, but its "
            "rewrite has no join for it; give all of it to one backend that builds it whole"
        )

    def _unsupported(self, model: specs.Model, lacking: Sequence[Lacking]) -> Lfm2kitError:
        them = "it" if len(lacking) == 1 else "them"
        able = (n for n in self.installed if all(self._can_build(n, one.spec) for one in lacking))
        who = ", ".join(able) or "no installed backend"
        plan = plan_without(
            self.plan,
            lacking,
            _assigned(model, self.plan),
            self.installed,
            self._can_build,
            lambda plan: replace(self, plan=plan)._can_place(model),
        )
        advice = () if plan is None else (". Try ", Option("backend", str(plan)))
        return Lfm2kitError(f"{in_words(lacking)}; {who} can build {them}", *advice)

    def _can_place(self, model: specs.Model) -> bool:
        try:
            return not self.placed_and_lacking(model)[1]
        except Exception:
            return False  # a backend that cannot run here, or is broken: no help to name it

    def _can_build(self, name: str, spec: Spec) -> bool:
        return can_build(self.create, name, spec)


def _assigned(model: specs.Model, plan: Plan) -> dict[str, dict[int | None, str]]:
    """Return the backend of each block of the model by its kind and its layer."""
    assigned: dict[str, dict[int | None, str]] = {}
    for part, where in _numbered(model, _Where()):
        for kind, _ in specs.leaves_by_kind(part.spec, part.kind):
            assigned.setdefault(kind, {})[where.layer] = plan.backend_for(where.layer, kind)
    return assigned


def _inside(spec: Spec) -> Iterator[Spec]:
    for part in spec.parts():
        yield part.spec
        yield from _inside(part.spec)


def _numbered(spec: Spec, where: _Where) -> Iterator[tuple[specs.Part, _Where]]:
    """Yield the parts of `spec`, each with `where` and the layer that it is or lies in.

    A layer is what lies in a model's `layers`, of whatever type a rewrite has put there; a `Layer`
    inside of that is a part of it.
    """
    for part in spec.parts():
        _, is_layer, number = part.role.partition("layers.")
        is_layer_of_model = is_layer and isinstance(spec, specs.Model)
        yield part, where._replace(layer=int(number)) if is_layer_of_model else where


def _part_place(
    name: str, scope: str, part: specs.Part, where: _Where
) -> tuple[str, str, Spec, _Where]:
    inside = where._replace(kind=part.kind or where.kind)
    return _dotted(name, part.role), _dotted(scope, part.scope), part.spec, inside


def _dotted(outer: str, inner: str) -> str:
    return f"{outer}.{inner}" if outer and inner else outer or inner
