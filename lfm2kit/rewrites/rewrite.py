"""What a rewrite is, which of them a run applies, and a helper to write one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lfm2kit import specs
from lfm2kit.building.joins import Joins
from lfm2kit.errors import Lfm2kitError, choices
from lfm2kit.specs import Spec


@dataclass(frozen=True, slots=True)
class Rewrite:
    """A change to the model as data, made before the plan gives its blocks to backends.

    `apply` returns a model that gives the same logits, and may put specs of types of its own into
    it.  A backend that knows such a type may build it.  For every other backend `joins` has, by
    type, how the core makes the block of the blocks of its parts.
    Raise `Lfm2kitError` in `apply` if the model cannot be rewritten.
    """

    name: str  # as in `--rewrite NAME`
    summary: str  # one line for the help of the command line, and for `lfm2kit plugins`
    apply: Callable[[specs.Model], specs.Model]
    joins: Joins = field(default_factory=dict)
    has_state: bool = True  # whether a sequence can go on after a forward of the rewritten model
    keeps_rows: bool = True  # whether every layer computes all rows of a batch, as it did before
    needs_rows: bool = False  # whether all rewrites that are applied with it must keep them
    is_automatic: bool = False  # applied without being asked for, after those that are


def chosen(
    names: Iterable[str], there: Mapping[str, Rewrite], skipped: str = ""
) -> tuple[Rewrite, ...]:
    """Return the rewrites `names` in their order, and then the automatic ones of `there`.

    Raise `Lfm2kitError` for a name that is not there, which ends with `skipped`, or is given
    twice.
    """
    asked: dict[str, Rewrite] = {}
    for name in names:
        if name not in there:
            raise Lfm2kitError(f"unknown rewrite '{name}'; {choices(name, there)}{skipped}")
        if name in asked:
            raise Lfm2kitError(f"rewrite '{name}' is given twice; give it once")
        asked[name] = there[name]
    automatic = {name: rewrite for name, rewrite in there.items() if rewrite.is_automatic}
    return tuple((asked | automatic).values())


def rewritten(
    model: specs.Model, joins: Joins, rewrites: Iterable[Rewrite]
) -> tuple[specs.Model, Joins]:
    """Return the model after all `rewrites`, and `joins` together with theirs.

    Raise `Lfm2kitError` if one needs rows that another one leaves out.
    """
    applied = tuple(rewrites)
    _check_rows(applied)
    for rewrite in applied:
        model, joins = rewrite.apply(model), {**joins, **rewrite.joins}
    return model, joins


def _check_rows(rewrites: tuple[Rewrite, ...]) -> None:
    needing = next((one.name for one in rewrites if one.needs_rows), None)
    leaving_out = next((one.name for one in rewrites if not one.keeps_rows), None)
    if needing is not None and leaving_out is not None:
        raise Lfm2kitError(
            f"'{needing}' needs all rows, and '{leaving_out}' leaves some out; "
            "give only one of them"
        )


def replaced(spec: Any, change: Callable[[Spec], Spec]) -> Any:
    """Return `spec` with `change` applied to it and to the specs inside it, the outermost first.

    Where `change` returns the spec that it is given, the specs in its fields are changed; another
    spec takes its place as it is.
    """
    changed: Any = change(spec)  # a dataclass, as every spec is
    if changed is not spec:
        return changed
    values = {f.name: getattr(changed, f.name) for f in dataclasses.fields(changed)}
    inner = {name: _replaced_in(value, change) for name, value in values.items()}
    return dataclasses.replace(changed, **inner) if inner != values else changed


def _replaced_in(value: Any, change: Callable[[Spec], Spec]) -> Any:
    if isinstance(value, Spec):
        return replaced(value, change)
    if isinstance(value, tuple) and any(isinstance(item, Spec) for item in value):
        return tuple(_replaced_in(item, change) for item in value)
    return value
