"""A model described by a TOML file of specs instead of a config.json; reads and writes them.

    tie_word_embeddings = true
    max_position_embeddings = 128000   # may be left out
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
from collections.abc import Collection, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from reprlib import repr as brief  # of what a file says, however long it is
from typing import Any, TypeVar

from lfm2kit import bounds, specs
from lfm2kit.checkpoint.documents import read_toml
from lfm2kit.errors import Lfm2kitError, choices

OPERATORS = {"ShortConv": specs.ShortConv, "Attention": specs.Attention}
NOT_DESCRIBED = "a file of specs cannot describe this model: it has blocks of its own"
ELSEWHERE = {"hidden_size", "local_experts"}  # said by the whole file, or by no file
FEED_FORWARDS = {"MLP": specs.MLP, "SparseMoe": specs.SparseMoe}

S = TypeVar("S")
Table = Mapping[str, Any]


def read_spec(path: Path) -> specs.Model:
    """Return the model that a TOML file describes; `Lfm2kitError` names the key that is wrong."""
    table = read_toml(path)
    try:
        return parse_spec(table)
    except Lfm2kitError as error:
        raise Lfm2kitError(f"{path}: ", *error.args) from None


def parse_spec(table: Table) -> specs.Model:
    """Return the model that the parsed file describes."""
    common = {key: value for key, value in table.items() if key != "layers"}
    _refuse_unknown("the model", common, COMMON)
    model = specs.Model(
        embed_tokens=_make("the model", specs.Embedding, common, {}),
        layers=tuple(_all_layers(table.get("layers"), common)),
        last_rows=_make("the model", specs.LastRows, common, {}),
        embedding_norm=_make("the model", specs.RMSNorm, common, {}),
        lm_head=_make("the model", specs.LMHead, common, {}),
        tie_word_embeddings=_checked(
            "tie_word_embeddings", "bool", common.get("tie_word_embeddings", True)
        ),
        max_position_embeddings=_checked(
            "max_position_embeddings", "int | None", common.get("max_position_embeddings")
        ),
    )
    bounds.check_tensors(model)
    return model


def _all_layers(tables: Any, common: Table) -> list[specs.Layer]:
    if not isinstance(tables, list) or not tables:
        raise Lfm2kitError("there is no [[layers]] table: write one per kind of layer")
    layers: list[specs.Layer] = []
    for i, table in enumerate(tables):
        layers += _layers(f"layers[{i}]", table, common)
        if len(layers) > bounds.LAYERS:
            raise Lfm2kitError(f"there are more than {bounds.LAYERS} layers, repeats included")
    return layers


def _layers(where: str, table: Any, common: Table) -> list[specs.Layer]:
    """Return the layers of one [[layers]] table: `repeat` times the same."""
    if not isinstance(table, dict):
        raise Lfm2kitError(f"{where} is {brief(table)}; expected a table")
    _refuse_unknown(where, table, {"repeat", "operator", "feed_forward"})
    repeat = bounds.whole(f"{where}.repeat", "repeat", table.get("repeat", 1))
    norm = _make(where, specs.RMSNorm, common, {})
    operator = _typed(f"{where}.operator", table.get("operator"), OPERATORS, common)
    feed_forward = _typed(f"{where}.feed_forward", table.get("feed_forward"), FEED_FORWARDS, common)
    return [specs.Layer(norm, operator, norm, feed_forward)] * repeat


def _typed(where: str, table: Any, types: Mapping[str, Any], common: Table) -> Any:
    """Return the spec of the class that the table's `type` names."""
    if not isinstance(table, dict) or not isinstance(table.get("type"), str):
        raise Lfm2kitError(f"{where} is {brief(table)}; expected a table with a type")
    if table["type"] not in types:
        raise Lfm2kitError(f"{where}.type is '{table['type']}'; {choices(table['type'], types)}")
    fields = {key: value for key, value in table.items() if key != "type"}
    hidden_size = common.get("hidden_size")
    if fields.get("hidden_size", hidden_size) != hidden_size:
        raise Lfm2kitError(f"{where}: hidden_size is not the model's {brief(hidden_size)}")
    if types[table["type"]] is specs.SparseMoe:
        return _sparse_moe(where, fields, common)
    _refuse_unknown(where, fields, _fields(types[table["type"]]))
    return _make(where, types[table["type"]], common, fields)


def _sparse_moe(where: str, fields: Table, common: Table) -> specs.SparseMoe:
    _refuse_unknown(where, fields, _fields(specs.Router, specs.Experts))
    router = _make(where, specs.Router, common, fields)
    everyone = {"local_experts": tuple(range(router.num_experts))}
    return specs.SparseMoe(router, _make(where, specs.Experts, common, {**fields, **everyone}))


def _refuse_unknown(where: str, table: Table, known: Collection[str]) -> None:
    for key in table:
        if key not in known:
            raise Lfm2kitError(f"{where} has no key '{key}'; {choices(key, known)}")


def _fields(*types: Any) -> set[str]:
    """Return the keys that a file gives for these specs."""
    return {field.name for t in types for field in dataclasses.fields(t)} - {"local_experts"}


# What the top of a file may say: anything that a spec below it has, and two things more.
COMMON = _fields(
    specs.Embedding, specs.RMSNorm, *OPERATORS.values(), specs.MLP, specs.Router, specs.Experts
) | {"tie_word_embeddings", "max_position_embeddings"}


def _make(where: str, spec: type[S], common: Table, fields: Table) -> S:
    """Return an instance of the dataclass `spec`, its fields from `fields`, else from `common`."""
    values = {}
    for field in dataclasses.fields(spec):  # type: ignore[arg-type]
        value = fields.get(field.name, common.get(field.name, field.default))
        if value is dataclasses.MISSING:
            raise Lfm2kitError(f"{where} has no {field.name} ({spec.__name__})")
        name = field.name
        values[name] = _checked(name, str(field.type), value, f"{where}: {name}")
    return spec(**values)


def _checked(key: str, annotation: str, value: Any, where: str = "") -> Any:
    """Return `value` if it fits the annotation and the bounds of the field `key`."""
    where = where or key
    if annotation == "int | None" and value is None:
        return None
    if annotation.startswith("int"):
        return bounds.whole(where, key, value)
    if annotation == "float":
        return bounds.real(where, key, value)
    if annotation == "bool" and not isinstance(value, bool):
        raise Lfm2kitError(f"{where} is {brief(value)}; expected true or false")
    return value


def spec_text(model: specs.Model) -> str:
    """Return the text of a TOML file from which `read_spec` reads `model`.

    Raise `Lfm2kitError` if a file cannot describe the model, as with another eps in some norm.
    """
    lines = [
        f"tie_word_embeddings = {_toml(model.tie_word_embeddings)}",
        f"vocab_size = {model.embed_tokens.vocab_size}",
        f"hidden_size = {model.embed_tokens.hidden_size}",
        f"eps = {_toml(model.embedding_norm.eps)}",
    ]
    if model.max_position_embeddings is not None:
        lines.append(f"max_position_embeddings = {model.max_position_embeddings}")
    for layer, equal in groupby(model.layers):
        if not isinstance(layer, specs.Layer):
            raise Lfm2kitError(NOT_DESCRIBED)
        lines += ["", "[[layers]]", *_layer_lines(layer, len(list(equal)))]
    text = "\n".join(lines) + "\n"
    if parse_spec(tomllib.loads(text)) != model:
        raise Lfm2kitError(NOT_DESCRIBED)
    return text


def _layer_lines(layer: specs.Layer, count: int) -> Iterator[str]:
    """Yield the lines of a [[layers]] table for `count` equal layers."""
    if count > 1:
        yield f"repeat = {count}"
    yield f"operator = {_inline(layer.operator)}"
    yield f"feed_forward = {_inline(layer.feed_forward)}"


def _inline(spec: specs.Spec) -> str:
    """Return an inline table with the type of a spec and its fields, hidden_size apart."""
    parts = [spec.router, spec.experts] if isinstance(spec, specs.SparseMoe) else [spec]
    fields = {f.name: getattr(part, f.name) for part in parts for f in dataclasses.fields(part)}  # type: ignore[arg-type]
    pairs = [f"{n} = {_toml(v)}" for n, v in fields.items() if n not in ELSEWHERE]
    return f'{{ type = "{type(spec).__name__}", {", ".join(pairs)} }}'


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)
