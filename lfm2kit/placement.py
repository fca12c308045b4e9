"""Resolves a plan over a model: every block's backend and memory, before a weight is touched.

The largest spec is asked for first: a backend that builds whole layers gets them whole, or all but
some parts that lie elsewhere; one that does neither is asked for the layer's parts, which the core
joins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from lfm2kit import specs
from lfm2kit.backend import Backend, Block, BuildsAround
from lfm2kit.errors import Lfm2kitError
from lfm2kit.memory import Memory
from lfm2kit.plan import Plan
from lfm2kit.specs import Spec
from lfm2kit.trim import TrimmedModel


class Join(NamedTuple):
    """How the core makes a larger block of its parts: `make(spec, **blocks by role)`."""

    make: Callable[..., Block]
    memory: Memory | None = None  # where it works, if not where its surroundings do


Joins = Mapping[type[Spec], Join]


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

    @property
    def is_copied(self) -> bool:
        return self.memory.name != self.outer.name

    def leaves(self) -> Iterator[Placed]:
        """The blocks that backends build, in the order of the forward."""
        if self.backend is not None:
            yield self
        for _, part in self.parts:
            yield from part.leaves()

    def copies(self) -> int:
        """How many blocks of the tree take their arrays from another memory."""
        return int(self.is_copied) + sum(part.copies() for _, part in self.parts)


@dataclass(frozen=True, slots=True)
class Placer:
    """Places specs as `plan` says; `create` gives backends, `installed` names them for errors."""

    plan: Plan
    create: Callable[[str], Backend]
    joins: Joins
    installed: Iterable[str] = ()

    def place(self, model: specs.Model | TrimmedModel) -> Placed:
        """The whole model's tree; `Lfm2kitError` where a backend lacks a block it is given."""
        self.plan.check(model)
        home = self.create(self.plan.default).memory(model.embed_tokens)
        return self._place("", "", model, None, home)

    def _place(self, name: str, scope: str, spec: Spec, layer: int | None, outer: Memory) -> Placed:
        backend = self._one_backend(spec, layer)
        if backend is not None:
            reason = self.create(backend).why_unsupported(spec)
            if reason is None:
                memory = self.create(backend).memory(spec)
                return Placed(name, scope, spec, memory, outer, backend)
            if not spec.parts():
                raise self._unsupported(name, spec, backend, reason)
        around = self._around(name, scope, spec, layer, outer)
        if around is not None:
            return around
        memory = self.joins[type(spec)].memory or outer
        parts = tuple(
            (part.role, self._place(*_part_place(name, scope, part, layer), memory))
            for part in spec.parts()
        )
        return Placed(name, scope, spec, memory, outer, None, parts)

    def _around(
        self, name: str, scope: str, spec: Spec, layer: int | None, outer: Memory
    ) -> Placed | None:
        """Returns `spec` built by one backend around parts that lie elsewhere, if one does that."""
        for backend in self._names(spec, layer) if layer is not None else ():
            builder = self.create(backend)
            if not isinstance(builder, BuildsAround):
                continue
            memory = builder.memory(spec)
            apart = {p.role: p for p in self._apart(spec, layer, backend, memory)}
            if apart and builder.why_not_around(spec, tuple(apart)) is None:
                parts = tuple(
                    (role, self._place(*_part_place(name, scope, part, layer), memory))
                    for role, part in apart.items()
                )
                return Placed(name, scope, spec, memory, outer, backend, parts)
        return None

    def _apart(
        self, spec: Spec, layer: int | None, backend: str, memory: Memory
    ) -> Iterator[specs.Part]:
        """Yields the largest parts of `spec` that `backend` does not compute in `memory`.

        Their roles are paths, and their scopes relative to that of `spec`.
        """
        for part in spec.parts():
            leaves = list(specs.leaves(part.spec))
            theirs = sum(not self._is_in(leaf, layer, backend, memory) for leaf in leaves)
            if theirs == len(leaves):
                yield part
            elif theirs:
                for inner in self._apart(part.spec, layer, backend, memory):
                    role, scope = _dotted(part.role, inner.role), _dotted(part.scope, inner.scope)
                    yield specs.Part(role, scope, inner.spec)

    def _is_in(self, leaf: Spec, layer: int | None, backend: str, memory: Memory) -> bool:
        """Whether the plan gives `leaf` to `backend`, which computes it in `memory`."""
        if self.plan.backend_for(layer, leaf.kind) != backend:
            return False
        own = self.create(backend)
        return own.why_unsupported(leaf) is not None or own.memory(leaf).name == memory.name

    def _names(self, spec: Spec, layer: int | None) -> dict[str, None]:
        """Returns the backends that the plan gives parts of `spec`, in the order of the forward."""
        leaves = specs.leaves(spec)
        return dict.fromkeys(self.plan.backend_for(layer, leaf.kind) for leaf in leaves)

    def _one_backend(self, spec: Spec, layer: int | None) -> str | None:
        """The backend that the plan gives every block of `spec`, if it is one and the same."""
        if isinstance(spec, specs.Model) and self.plan.rules:
            return None
        names = self._names(spec, layer)
        return next(iter(names)) if len(names) == 1 else None

    def _unsupported(self, name: str, spec: Spec, backend: str, reason: str) -> Lfm2kitError:
        others = ", ".join(self._supporting(spec)) or "no installed backend"
        return Lfm2kitError(
            f"{name}: backend '{backend}' has no {type(spec).__name__} block ({reason}); "
            f"{others} can build it. Try --backend '{self.plan},{spec.kind}=NAME'"
        )

    def _supporting(self, spec: Spec) -> Iterator[str]:
        for name in self.installed:
            try:
                if self.create(name).why_unsupported(spec) is None:
                    yield name
            except Exception:
                continue  # it cannot run here, or is broken: no help to name it


def _part_place(
    name: str, scope: str, part: specs.Part, layer: int | None
) -> tuple[str, str, Spec, int | None]:
    if part.spec.kind == specs.Layer.kind:
        layer = int(part.role.removeprefix("layers."))
    return _dotted(name, part.role), _dotted(scope, part.scope), part.spec, layer


def _dotted(outer: str, inner: str) -> str:
    return f"{outer}.{inner}" if outer and inner else outer or inner
