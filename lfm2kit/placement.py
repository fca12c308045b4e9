"""Resolves a plan over a model: every block's backend and memory, before a weight is touched.

The largest spec is asked for first: a backend that builds whole layers gets them whole; one that
does not is asked for the layer's parts, which the core joins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from lfm2kit import specs
from lfm2kit.backend import Backend, Block
from lfm2kit.errors import Lfm2kitError, Option
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
    """A spec with its place: built by `backend`, or (None) joined by the core from `parts`."""

    name: str  # "layers.2.feed_forward"
    scope: str  # of its weights in the checkpoint's names
    spec: Spec
    memory: Memory
    outer: Memory  # of its surroundings; a copy is made where the two differ
    backend: str | None
    parts: tuple[tuple[str, Placed], ...] = ()  # by role

    @property
    def is_copied(self) -> bool:
        return self.memory.name != self.outer.name

    def tree(self) -> Iterator[Placed]:
        """This block and all its parts, in the order of the forward."""
        yield self
        for _, part in self.parts:
            yield from part.tree()

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
        memory = self.joins[type(spec)].memory or outer
        parts = tuple(
            (part.role, self._place(*_part_place(name, scope, part, layer), memory))
            for part in spec.parts()
        )
        return Placed(name, scope, spec, memory, outer, None, parts)

    def _one_backend(self, spec: Spec, layer: int | None) -> str | None:
        """The backend that the plan gives every block of `spec`, if it is one and the same."""
        if isinstance(spec, specs.Model) and self.plan.rules:
            return None
        names = {self.plan.backend_for(layer, leaf.kind) for leaf in specs.leaves(spec)}
        return names.pop() if len(names) == 1 else None

    def _unsupported(self, name: str, spec: Spec, backend: str, reason: str) -> Lfm2kitError:
        others = ", ".join(self._supporting(spec)) or "no installed backend"
        return Lfm2kitError(
            f"{name}: backend '{backend}' has no {type(spec).__name__} block ({reason}); "
            f"{others} can build it. Try ",
            Option("backend", f"{self.plan},{spec.kind}=NAME"),
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
