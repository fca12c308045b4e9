"""Keeps a plugin's rewrite to the contract: what it does wrong is one line that names it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from reprlib import repr as brief  # of what a plugin returned, however long it is
from typing import Any

from lfm2kit.backend import Block
from lfm2kit.building.joins import Join
from lfm2kit.errors import Lfm2kitError
from lfm2kit.memory import Memory
from lfm2kit.plugin_faults import blaming
from lfm2kit.rewrites.rewrite import Rewrite
from lfm2kit.specs import Model, Shape, Spec


def kept_to_contract(rewrite: Rewrite, plugin: str, ranks: int) -> Rewrite:
    """Return the rewrite with its results checked, in a job of `ranks` ranks.

    Its functions then raise `Lfm2kitError` where they raise anything, return something else than
    they should, or make a model of other tensors than the checkpoint's.
    """
    who = f"rewrite '{rewrite.name}' of plugin '{plugin}'"

    def apply(model: Model) -> Model:
        with blaming(who):
            rewritten = rewrite.apply(model)
            _check_form(who, rewritten)
            _check_tensors(who, model, rewritten, may_leave_out=ranks > 1)
        return rewritten

    joins = {spec: partial(_joined, who, join) for spec, join in rewrite.joins.items()}
    return replace(rewrite, apply=apply, joins=joins)


def _check_form(who: str, model: Any) -> None:
    if not isinstance(model, Model):
        raise Lfm2kitError(f"{who} returned {brief(model)}, not a Model")
    if not isinstance(model.layers, tuple) or not model.layers:
        raise Lfm2kitError(f"{who}: the layers are {brief(model.layers)}, not a tuple of specs")
    for i, layer in enumerate(model.layers):
        if not isinstance(layer, Spec):
            raise Lfm2kitError(f"{who}: layers.{i} is {brief(layer)}, not a Spec")
    _check_parts(who, "", model)


def _check_parts(who: str, name: str, spec: Spec) -> None:
    """Check kinds, which a plan needs, and roles, by which a join gets the parts of a spec."""
    if not isinstance(getattr(spec, "kind", None), str):
        raise Lfm2kitError(f"{who}: {name}, a {type(spec).__name__}, has no kind")
    roles = [part.role for part in spec.parts()]
    for role, _, part in spec.parts():
        if not isinstance(part, Spec):
            raise Lfm2kitError(f"{who}: {name}.{role} is {brief(part)}, not a Spec")
        if roles.count(role) > 1:
            raise Lfm2kitError(f"{who}: {name} has two parts '{role}'")
        _check_parts(who, f"{name}.{role}" if name else role, part)


def _check_tensors(who: str, model: Model, rewritten: Model, *, may_leave_out: bool) -> None:
    """Check that the rewritten model has all of the model's tensors; a rank may hold a share."""
    there, wanted = model.parameters(), rewritten.parameters()
    for name, shape in _wanted(rewritten):
        if name not in there:
            raise Lfm2kitError(f"{who}: there is no tensor '{name}', which its model needs")
        if shape != there[name]:
            raise Lfm2kitError(
                f"{who}: tensor '{name}' has shape {list(there[name])}, "
                f"but its model needs {list(shape)}"
            )
    left_out = [name for name in there if name not in wanted]
    if left_out and not may_leave_out:
        more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
        raise Lfm2kitError(f"{who}: its model leaves out tensor '{left_out[0]}'{more}")


def _wanted(model: Model) -> Iterator[tuple[str, Shape]]:
    """Yield the tensors of the model's parts; two that share one may want different shapes."""
    for part in model.parts():
        for name, shape in part.spec.parameters().items():
            yield f"{part.scope}.{name}" if part.scope else name, shape


def _joined(who: str, factory: Callable[[Memory], Join], outer: Memory) -> Join:
    with blaming(f"a join of {who}"):
        join = factory(outer)
    if not isinstance(join, Join):
        raise Lfm2kitError(f"a join of {who} is {brief(join)}, not a Join")

    def make(spec: Spec, **parts: Block) -> Block:
        joining = f"{who}, joining a {type(spec).__name__},"
        with blaming(joining):
            block = join.make(spec, **parts)
        if not callable(block):
            raise Lfm2kitError(f"{joining} returned {brief(block)}, not a block")
        return block

    return replace(join, make=make)
