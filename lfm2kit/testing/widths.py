"""Gives blocks other widths: those of a model, or one width for everything."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from lfm2kit import specs
from lfm2kit.specs import Spec

S = TypeVar("S", bound=Spec)

MOST_EXPERTS = 5  # of a model's layer, so that its weights stay small; checks count on as many


@dataclass(frozen=True, slots=True)
class Widths:
    """The sizes that blocks get instead of their own."""

    hidden: int
    mlp: int
    expert: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    most_experts: int | None = None  # of a block; None: as many as it has

    @classmethod
    def of(cls, width: int) -> Widths:
        """Return one width for everything, and heads of 64 as in the release."""
        return cls(width, width, width, max(width // 64, 1), max(width // 256, 1), 64)

    @classmethod
    def of_model(cls, model: specs.Model) -> Widths:
        """Return a model's widths, for few experts; what it lacks is as wide as the rest."""
        sizes = cls.of(model.embed_tokens.hidden_size)
        changed: dict[str, int] = {"most_experts": MOST_EXPERTS}
        for leaf in specs.leaves(model):
            match leaf:
                case specs.MLP():
                    changed["mlp"] = leaf.intermediate_size
                case specs.Experts():
                    changed["expert"] = leaf.intermediate_size
                case specs.Attention():
                    changed |= {name: getattr(leaf, name) for name in HEADS}
        return replace(sizes, **changed)

    def fields_of(self, spec: Spec) -> dict[str, Any]:
        """Return the fields that a plain spec gets, and others."""
        sizes: dict[str, Any] = {name: getattr(self, name) for name in HEADS}
        inner = self.expert if isinstance(spec, specs.Experts) else self.mlp
        sizes |= {"hidden_size": self.hidden, "intermediate_size": inner}
        if isinstance(spec, specs.Experts) and self.most_experts is not None:
            sizes |= _few(spec, self.most_experts)
        return sizes


HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim")


def resized(spec: S, widths: Widths) -> S:
    """Return `spec`, and all its parts, with these widths."""
    values = {field.name: getattr(spec, field.name) for field in fields(spec)}  # type: ignore[arg-type]
    parts = {n: resized(v, widths) for n, v in values.items() if isinstance(v, Spec)}
    if isinstance(spec, specs.SparseMoe):
        parts["router"] = _of_as_many(parts["router"], parts["experts"])
    sizes = widths.fields_of(spec)
    changed = {name: sizes[name] for name in values.keys() & sizes.keys()}
    return replace(spec, **parts, **changed)  # type: ignore[type-var]


def first_of_each(candidates: Iterable[S]) -> list[S]:
    """Return the first spec of each type, among larger ones of each types of parts."""
    first: dict[Any, S] = {}
    for spec in candidates:
        first.setdefault(_types(spec), spec)
    return list(first.values())


def _types(spec: Spec) -> tuple[Any, ...]:
    return type(spec), *(_types(part.spec) for part in spec.parts())


def _few(spec: specs.Experts, most: int) -> dict[str, Any]:
    count = min(spec.num_experts, most)
    return {
        "num_experts": count,
        "num_experts_per_tok": min(spec.num_experts_per_tok, count),
        "local_experts": tuple(dict.fromkeys(e % count for e in spec.local_experts)),
    }


def _of_as_many(router: Any, experts: Any) -> Any:
    """Return a router that chooses among as many experts as there are."""
    sizes = {n: getattr(experts, n) for n in ("num_experts", "num_experts_per_tok")}
    return replace(router, **sizes)
