"""Inputs drawn as structures: sound ones of which a few parts say something else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

from lfm2kit.checkpoint.config import FIXED, TWINS
from tests.core.small import FIELDS

Json = Any

NUMBERS = [0, 1, -1, 2, 3, 4, 24, 1023, 1024, 1025, 2**20 + 1, 2**31, 2**63, 2**64, 10**310]
REALS = [0.0, -0.0, 5e-324, 1e-5, 0.5, 1.0, 1e12, 1e300, float("inf"), float("nan")]
WORDS = ["", "default", "yarn", "conv", "full_attention", "lfm2_moe", "silu", "gptq", "F32", "\n"]

scalars = (
    st.none()
    | st.booleans()
    | st.sampled_from(NUMBERS)
    | st.sampled_from(REALS)
    | st.sampled_from(WORDS)
    | st.text(max_size=5)
)
values: st.SearchStrategy[Json] = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(WORDS), inner),
    max_leaves=6,
)


def deep(levels: int) -> Json:
    value: Json = 1
    for _ in range(levels):
        value = [value]
    return value


odd = values | st.sampled_from([126, 127, 400]).map(deep)


@st.composite
def changed(draw: st.DrawFn, fields: Mapping[str, Json], others: list[str]) -> dict[str, Json]:
    """Draw `fields` with up to three keys removed, changed, or new from `others`."""
    result = dict(fields)
    for key in draw(st.lists(st.sampled_from([*fields, *others]), max_size=3)):
        result[key] = draw(odd)
        if draw(st.integers(0, 4)) == 0:
            del result[key]
    return result


rope = st.fixed_dictionaries(
    {},
    optional={
        "rope_theta": st.sampled_from([5000.0, 5e6, 0, None]),
        "rope_type": st.sampled_from(["default", "yarn", None]),
        "type": st.sampled_from(["default", "linear"]),
        "factor": st.sampled_from([1, 1.0, 4]),
        "full_attention": st.just({"rope_theta": 5000.0}),
    },
)


ADJUSTED = {
    "model_type": "lfm2",
    "block_ff_dim": 60,
    "intermediate_size": 40,
    "block_auto_adjust_ff_dim": True,
    "block_ffn_dim_multiplier": 1.0,
    "block_multiple_of": 8,
}


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Json]:
    """Draw the fields of a config.json, most of them sound."""
    others = [*TWINS, *FIXED, "head_dim", "full_attn_idxs", "quantization_config", "theta"]
    others.append("max_position_embeddings")
    fields = draw(changed(FIELDS | draw(st.sampled_from([{}, ADJUSTED])), others))
    for key in draw(st.lists(st.sampled_from(["rope_parameters", "rope_scaling"]), max_size=2)):
        fields[key] = draw(rope)
    return fields


@st.composite
def json_texts(draw: st.DrawFn, document: st.SearchStrategy[Json]) -> bytes:
    """Draw a document as text, sometimes with a key twice or bytes changed."""
    text = json.dumps(draw(document), ensure_ascii=draw(st.booleans()))
    if draw(st.integers(0, 4)) == 0:
        text = text.replace("{", '{"vocab_size": 50, ', draw(st.integers(1, 2)))
    return draw(damaged(text.encode("utf-8", errors="replace")))


@st.composite
def damaged(draw: st.DrawFn, file: bytes) -> bytes:
    """Draw a file as it is, or with bytes replaced, inserted, removed or cut off."""
    if draw(st.integers(0, 2)):
        return file
    for _ in range(draw(st.integers(1, 3))):
        at, width = draw(st.integers(0, len(file))), draw(st.integers(0, 4))
        file = file[:at] + draw(st.binary(max_size=4)) + file[at + width :]
    return file[: draw(st.integers(0, len(file)))] if draw(st.booleans()) else file


def toml(value: Json) -> str:
    """Write a value as TOML; what TOML lacks, such as null, becomes a text."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()) + "}"
    return json.dumps(str(value))


def toml_text(table: Mapping[str, Json]) -> str:
    """Write a table as TOML, every list of tables as one of inline tables."""
    return "".join(f"{json.dumps(key)} = {toml(value)}\n" for key, value in table.items())
