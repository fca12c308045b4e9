"""Which backend builds which block: `cpu_simd,2-4.moe=reference,attn=reference`, or a TOML file.

    default = "cpu_simd"
    [[rule]]
    layers = "2-4"        # or "3", or left out for every layer
    kind = "moe"          # or left out for every block of those layers
    backend = "reference"

The first item of the text is the default; where several rules fit a block, the last one wins.
A backend may have a precision of its own, other than the model's: `NAME:bf16,head=NAME:fp32`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from reprlib import repr as brief  # of what a file says, however long it is
from typing import Any

from lfm2kit import bounds, specs
from lfm2kit.checkpoint.documents import read_toml
from lfm2kit.errors import Lfm2kitError, Option, choices

AUTO = "auto"  # in a plan: the best backend of this machine

# Experts of a layer that is split, see `lfm2kit.rewrites.experts_split`.
STREAMED_EXPERTS, HOST_EXPERTS = "streamed_experts", "host_experts"
PARTS_OF_EXPERTS = frozenset({STREAMED_EXPERTS, HOST_EXPERTS})
EXPERTS = PARTS_OF_EXPERTS | {"experts"}

# What a kind in a plan stands for: a block's own kind, or a group of them.
KINDS: dict[str, frozenset[str]] = {
    **{k: frozenset({k}) for k in ("embed", "norm", "conv", "attn", "mlp", "rows", "head")},
    **{k: frozenset({k}) for k in ("scores", "choice", STREAMED_EXPERTS, HOST_EXPERTS)},
    "router": frozenset({"scores", "choice"}),
    "experts": EXPERTS,
    "moe": EXPERTS | {"scores", "choice"},
    "operator": frozenset({"conv", "attn"}),
    "ffn": EXPERTS | {"mlp", "scores", "choice"},
}


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule: blocks of `kind` (None: all) in `layers` (None: anywhere) come from `backend`."""

    backend: str
    kind: str | None = None
    layers: range | None = None

    def fits(self, layer: int | None, kind: str) -> bool:
        here = self.layers is None or (layer is not None and layer in self.layers)
        return here and (self.kind is None or kind in KINDS[self.kind])

    def __str__(self) -> str:
        where = [_range_text(self.layers)] if self.layers is not None else []
        return ".".join([*where, *([self.kind] if self.kind else [])]) + f"={self.backend}"


@dataclass(frozen=True, slots=True)
class Plan:
    """A default backend and the exceptions from it."""

    default: str
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        if len(self.rules) > bounds.RULES:
            raise Lfm2kitError(
                f"the plan has {len(self.rules)} rules; lfm2kit takes up to {bounds.RULES}"
            )
        for backend in self.backends():
            if not re.fullmatch("[^:]+(:[^:]+)?", backend):
                raise Lfm2kitError(
                    f"plan item '{backend}': expected a backend, or a backend and its "
                    "precision, such as NAME:bf16"
                )

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Return the plan that a text describes; `Lfm2kitError` names the item that is wrong."""
        default, *items = [item.strip() for item in text.split(",")]
        if not default or "=" in default:
            raise Lfm2kitError(
                f"plan '{text}' begins with '{default}'; begin with the default backend, "
                "then [LAYERS.]KIND=BACKEND items: auto,2-4.moe=reference"
            )
        return cls(default, tuple(_parse_rule(item) for item in items))

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Return the plan in a TOML file."""
        table = read_toml(path)
        try:
            return _parse_table(table)
        except Lfm2kitError as error:
            raise Lfm2kitError(f"{path}: ", *error.args) from None

    def backend_for(self, layer: int | None, kind: str) -> str:
        """Return the backend of a block of `kind` in `layer`; None means outside the layers."""
        fitting = (rule.backend for rule in reversed(self.rules) if rule.fits(layer, kind))
        return next(fitting, self.default)

    def backends(self) -> set[str]:
        return {self.default, *(rule.backend for rule in self.rules)}

    def with_default(self, backend: str) -> Plan:
        return replace(self, default=backend)

    def with_cpu_experts(
        self, count: int, model: specs.Model, on_host: Callable[[str], str]
    ) -> Plan:
        """Return the same plan with the experts of the first `count` MoE layers on the host.

        `on_host` takes the item that this plan gives such experts, and returns the one instead.
        """
        sparse = [i for i, kinds in enumerate(_kinds(model)) if "experts" in kinds]
        if not 0 <= count <= len(sparse):
            there = f": the model has {len(sparse)} MoE layers"
            raise Lfm2kitError(Option("n_cpu_moe", count), there)
        items = ((i, on_host(self.backend_for(i, "experts"))) for i in sparse[:count])
        rules = (Rule(item, "experts", range(i, i + 1)) for i, item in items)
        return replace(self, rules=(*self.rules, *rules))

    def for_whole_experts(self) -> Plan:
        """Return the same plan without rules for parts that only split experts have."""
        rules = (r for r in self.rules if r.kind not in PARTS_OF_EXPERTS)
        return replace(self, rules=tuple(rules))

    def with_host_experts(self, layers: Iterable[int], on_host: Callable[[str], str]) -> Plan:
        """Return the same plan with the host's part of these layers' split experts on the host.

        Where a rule says who builds that part, it stays.  `on_host` is as in `with_cpu_experts`.
        """
        said = [rule for rule in self.rules if rule.kind == HOST_EXPERTS]
        unsaid = [i for i in layers if not any(rule.fits(i, HOST_EXPERTS) for rule in said)]
        items = [on_host(self.backend_for(i, "experts")) for i in unsaid]
        if not said and len(set(items)) == 1:
            rules = [Rule(items[0], HOST_EXPERTS)]
        else:
            both = zip(items, unsaid, strict=True)
            rules = [Rule(item, HOST_EXPERTS, range(i, i + 1)) for item, i in both]
        return replace(self, rules=(*self.rules, *rules))

    def check(self, model: specs.Model) -> None:
        """Raise `Lfm2kitError` if a rule fits no block of `model`."""
        kinds = _kinds(model)
        outside = {"embed", "rows", "norm", "head"}
        for rule in self.rules:
            if rule.layers is not None and rule.layers.stop > len(kinds):
                raise Lfm2kitError(f"plan item '{rule}': the model has layers 0-{len(kinds) - 1}")
            fits = any(rule.fits(i, kind) for i, some in enumerate(kinds) for kind in some)
            if not fits and not any(rule.fits(None, kind) for kind in outside):
                there = [_range_text(range(i, i + 1)) for i in _layers_with(rule.kind, kinds)]
                raise Lfm2kitError(
                    f"plan item '{rule}' fits no block; layers with {rule.kind}: "
                    f"{', '.join(there) or 'none'}"
                )

    def __str__(self) -> str:
        return ",".join([self.default, *map(str, self.rules)])


def _kinds(model: specs.Model) -> list[set[str]]:
    return [{kind for kind, _ in specs.leaves_by_kind(layer)} for layer in model.layers]


def _layers_with(kind: str | None, kinds: list[set[str]]) -> Iterator[int]:
    return (i for i, some in enumerate(kinds) if kind is None or KINDS[kind] & some)


def _parse_rule(item: str) -> Rule:
    """Return the rule of an item: `2-4.moe=reference`, `moe=reference` or `2-4=reference`."""
    where, equals, backend = (part.strip() for part in item.partition("="))
    if not (equals and where and backend):
        raise Lfm2kitError(
            f"plan item '{item}': expected [LAYERS.]KIND=BACKEND, such as 2-4.moe=NAME"
        )
    layers, dot, kind = where.partition(".")
    if dot:
        return _rule(backend, kind, layers, item)
    if where[0].isdigit():
        return _rule(backend, None, where, item)
    return _rule(backend, where, None, item)


def _parse_table(table: dict[str, Any]) -> Plan:
    _only_keys(table, ("default", "rule"), "the plan")
    default, rules = table.get("default"), table.get("rule", [])
    if not isinstance(default, str):
        raise Lfm2kitError(f"default is {brief(default)}; expected a backend's name")
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise Lfm2kitError(f"rule is {brief(rules)}; expected an array of tables: write [[rule]]")
    return Plan(default, tuple(_table_rule(rule) for rule in rules))


def _table_rule(table: dict[str, Any]) -> Rule:
    _only_keys(table, ("layers", "kind", "backend"), "a rule")
    for key, value in table.items():
        is_layer = key == "layers" and isinstance(value, int) and not isinstance(value, bool)
        if not is_layer and not isinstance(value, str):
            raise Lfm2kitError(f"rule {brief(table)}: {key} is {brief(value)}; expected a text")
    if "backend" not in table:
        raise Lfm2kitError(f"rule {brief(table)} has no backend")
    texts = {key: str(value) for key, value in table.items()}
    return _rule(texts["backend"], texts.get("kind"), texts.get("layers"), brief(table))


def _rule(backend: str, kind: str | None, layers: str | None, item: str) -> Rule:
    if kind is not None and kind not in KINDS:
        raise Lfm2kitError(f"plan item '{item}': unknown kind '{kind}'; {choices(kind, KINDS)}")
    return Rule(backend, kind, None if layers is None else _parse_range(layers, item))


def _parse_range(text: str, item: str) -> range:
    """Return the layers that `3` or `2-4` names."""
    numbers = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", text.strip())
    if numbers is None:
        raise Lfm2kitError(
            f"plan item '{item}': '{text}' is not a layer; expected a number, or a range such as "
            "2-4"
        )
    first, last = (_layer(digits) for digits in (numbers[1], numbers[2] or numbers[1]))
    if max(first, last) >= bounds.LAYERS:
        raise Lfm2kitError(f"plan item '{item}': lfm2kit takes layers up to {bounds.LAYERS - 1}")
    if last < first:
        raise Lfm2kitError(f"plan item '{item}': the range {text} is empty")
    return range(first, last + 1)


def _layer(digits: str) -> int:
    """Read a number of any length; of thousands of digits only the first few are read."""
    return int(digits.lstrip("0")[:9] or "0")


def _only_keys(table: dict[str, Any], known: Iterable[str], what: str) -> None:
    for key in table:
        if key not in known:
            raise Lfm2kitError(f"{what} has no key '{key}'; {choices(key, known)}")


def _range_text(layers: range) -> str:
    last = layers.stop - 1
    return str(last) if len(layers) == 1 else f"{layers.start}-{last}"
