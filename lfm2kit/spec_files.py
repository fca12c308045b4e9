"""A model described by a TOML file of specs instead of a config.json.

    tie_word_embeddings = true
    vocab_size = 1024             # what a spec's own table does not say
    hidden_size = 128             # is looked for here
    eps = 1e-5

    [[layers]]
    repeat = 2                    # default 1
    operator = { type = "ShortConv", kernel_size = 3 }
    feed_forward = { type = "MLP", intermediate_size = 320 }

    [[layers]]
    operator = { type = "Attention", num_attention_heads = 8, ... }
    feed_forward = { type = "SparseMoe", num_experts = 16, ... }

The keys are the fields of the dataclasses in `lfm2kit.specs`; a SparseMoe's are its router's and
its experts'.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from lfm2kit import specs
from lfm2kit.errors import Lfm2kitError, choices

OPERATORS = {"ShortConv": specs.ShortConv, "Attention": specs.Attention}
FEED_FORWARDS = {"MLP": specs.MLP, "SparseMoe": specs.SparseMoe}

S = TypeVar("S")
Table = Mapping[str, Any]


def read_spec(path: Path) -> specs.Model:
    """The model that a TOML file describes; `Lfm2kitError` names the key that is wrong."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise Lfm2kitError(f"{path}: not a readable TOML file: {error}") from None
    try:
        return parse_spec(table)
    except Lfm2kitError as error:
        raise Lfm2kitError(f"{path}: {error}") from None


def parse_spec(table: Table) -> specs.Model:
    """The model that the parsed file describes."""
    common = {k: v for k, v in table.items() if not isinstance(v, (dict, list))}
    layers = table.get("layers")
    if not isinstance(layers, list) or not layers:
        raise Lfm2kitError("there is no [[layers]] table: write one per kind of layer")
    built = [layer for i, t in enumerate(layers) for layer in _layers(f"layers[{i}]", t, common)]
    return specs.Model(
        embed_tokens=_make("the model", specs.Embedding, common, {}),
        layers=tuple(built),
        last_rows=_make("the model", specs.LastRows, common, {}),
        embedding_norm=_make("the model", specs.RMSNorm, common, {}),
        lm_head=_make("the model", specs.LMHead, common, {}),
        tie_word_embeddings=bool(common.get("tie_word_embeddings", True)),
    )


def _layers(where: str, table: Any, common: Table) -> list[specs.Layer]:
    """The layers of one [[layers]] table: `repeat` times the same."""
    if not isinstance(table, dict):
        raise Lfm2kitError(f"{where} is {table!r}; expected a table")
    for key in table:
        if key not in ("repeat", "operator", "feed_forward"):
            raise Lfm2kitError(
                f"{where} has no key '{key}'; "
                + choices(key, ["repeat", "operator", "feed_forward"])
            )
    repeat = table.get("repeat", 1)
    if not isinstance(repeat, int) or not 1 <= repeat <= 10_000:
        raise Lfm2kitError(f"{where}.repeat is {repeat!r}; expected a whole number of 1 or more")
    norm = _make(where, specs.RMSNorm, common, {})
    operator = _typed(f"{where}.operator", table.get("operator"), OPERATORS, common)
    feed_forward = _typed(f"{where}.feed_forward", table.get("feed_forward"), FEED_FORWARDS, common)
    return [specs.Layer(norm, operator, norm, feed_forward)] * repeat


def _typed(where: str, table: Any, types: Mapping[str, Any], common: Table) -> Any:
    """The spec of the class that the table's `type` names."""
    if not isinstance(table, dict) or not isinstance(table.get("type"), str):
        raise Lfm2kitError(f"{where} is {table!r}; expected a table with a type")
    if table["type"] not in types:
        raise Lfm2kitError(f"{where}.type is '{table['type']}'; {choices(table['type'], types)}")
    fields = {key: value for key, value in table.items() if key != "type"}
    if types[table["type"]] is specs.SparseMoe:
        return _sparse_moe(where, fields, common)
    _refuse_unknown(where, fields, types[table["type"]])
    return _make(where, types[table["type"]], common, fields)


def _sparse_moe(where: str, fields: Table, common: Table) -> specs.SparseMoe:
    _refuse_unknown(where, fields, specs.Router, specs.Experts)
    router = _make(where, specs.Router, common, fields)
    everyone = {"local_experts": range(router.num_experts)}
    return specs.SparseMoe(router, _make(where, specs.Experts, common, {**fields, **everyone}))


def _refuse_unknown(where: str, fields: Table, *types: Any) -> None:
    known = {field.name for t in types for field in dataclasses.fields(t)} - {"local_experts"}
    for key in fields:
        if key not in known:
            raise Lfm2kitError(f"{where} has no key '{key}'; {choices(key, known)}")


def _make(where: str, spec: type[S], common: Table, fields: Table) -> S:
    """An instance of the dataclass `spec`, its fields from `fields`, else from `common`."""
    values = {}
    for field in dataclasses.fields(spec):  # type: ignore[arg-type]
        value = fields.get(field.name, common.get(field.name, field.default))
        if value is dataclasses.MISSING:
            raise Lfm2kitError(f"{where} has no {field.name} ({spec.__name__})")
        values[field.name] = _checked(f"{where}: {field.name}", str(field.type), value)
    return spec(**values)


def _checked(where: str, annotation: str, value: Any) -> Any:
    """`value` if it fits the annotation of the field; a whole number will do for a float."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = {
        "int": is_number and isinstance(value, int) and 1 <= value < 2**31,
        "float": is_number and value == value,
        "bool": isinstance(value, bool),
    }
    if not fits.get(annotation, True):
        raise Lfm2kitError(f"{where} is {value!r}; expected {annotation}")
    return float(value) if annotation == "float" else value
