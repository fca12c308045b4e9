"""The checkpoint's config.json under its own field names, and the specs that it describes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfm2kit import specs
from lfm2kit.errors import Lfm2kitError

CONV, ATTENTION = "conv", "full_attention"
MOST_LAYERS = MOST_EXPERTS = 1024  # what no such model comes near: larger numbers are not believed


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """An `lfm2_moe` configuration.  Nothing is filled in from another library's class defaults:
    those are not this model's (32 layers, eos 2)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    layer_types: tuple[str, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_dense_layers: int
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    use_expert_bias: bool
    routed_scaling_factor: float
    conv_L_cache: int
    conv_bias: bool
    norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool | None  # None: the file does not say; tied unless a head is stored

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layer_types)


# The published LFM2-8B-A1B: what an assignment's `model.bin`, which has no config, is taken for.
LFM2_8B_A1B = ModelConfig(
    vocab_size=65536,
    hidden_size=2048,
    intermediate_size=7168,
    moe_intermediate_size=1792,
    layer_types=tuple(ATTENTION if i in (2, 6, 10, 14, 18, 21) else CONV for i in range(24)),
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    num_dense_layers=2,
    num_experts=32,
    num_experts_per_tok=4,
    norm_topk_prob=True,
    use_expert_bias=True,
    routed_scaling_factor=1.0,
    conv_L_cache=3,
    conv_bias=False,
    norm_eps=1e-5,
    rope_theta=1e6,
    tie_word_embeddings=None,
)


def read_config(path: Path) -> ModelConfig:
    """The configuration in a config.json; `Lfm2kitError` where it is not one that can be run."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Lfm2kitError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise Lfm2kitError(f"{path}: not a readable JSON file: {error}") from None
    if not isinstance(fields, dict):
        raise Lfm2kitError(f"{path}: expected a JSON object, got {type(fields).__name__}")
    try:
        return parse_config(fields)
    except Lfm2kitError as error:
        raise Lfm2kitError(f"{path}: {error}") from None


def parse_config(fields: Mapping[str, Any]) -> ModelConfig:
    """The configuration that the keys of a config.json describe; `Lfm2kitError` names a bad key."""
    model_type = fields.get("model_type", "lfm2_moe")
    if model_type != "lfm2_moe":
        raise Lfm2kitError(f"model_type is {model_type!r}; lfm2kit runs 'lfm2_moe'")
    if fields.get("hidden_act", "silu") != "silu":
        raise Lfm2kitError(f"hidden_act is {fields['hidden_act']!r}; lfm2kit has 'silu'")
    layer_types = _layer_types(fields)
    hidden_size = _whole(fields, "hidden_size")
    heads = _whole(fields, "num_attention_heads")
    dense = _whole(fields, "num_dense_layers", least=0)
    sparse = dense < len(layer_types)
    config = ModelConfig(
        vocab_size=_whole(fields, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_whole(fields, "intermediate_size") if dense else 0,
        moe_intermediate_size=_whole(fields, "moe_intermediate_size") if sparse else 0,
        layer_types=layer_types,
        num_attention_heads=heads,
        num_key_value_heads=_whole(fields, "num_key_value_heads"),
        head_dim=_head_dim(fields, hidden_size, heads),
        num_dense_layers=min(dense, len(layer_types)),
        num_experts=_whole(fields, "num_experts", most=MOST_EXPERTS) if sparse else 0,
        num_experts_per_tok=_whole(fields, "num_experts_per_tok") if sparse else 0,
        norm_topk_prob=_flag(fields, "norm_topk_prob"),
        use_expert_bias=_flag(fields, "use_expert_bias"),
        routed_scaling_factor=_real(fields, "routed_scaling_factor"),
        conv_L_cache=_whole(fields, "conv_L_cache"),
        conv_bias=_flag(fields, "conv_bias"),
        norm_eps=_real(fields, "norm_eps"),
        rope_theta=_rope_theta(fields),
        tie_word_embeddings=_tied(fields),
    )
    model_spec(config, tied=True)  # the specs refuse what does not fit together
    return config


def model_spec(config: ModelConfig, *, tied: bool) -> specs.Model:
    """The specs of the model that `config` describes; `tied` says whose weight the head reads."""
    c = config
    norm = specs.RMSNorm(c.hidden_size, c.norm_eps)
    operators: dict[str, specs.ShortConv | specs.Attention] = {
        CONV: specs.ShortConv(c.hidden_size, c.conv_L_cache, c.conv_bias),
        ATTENTION: specs.Attention(
            c.hidden_size,
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
            c.rope_theta,
            c.norm_eps,
        ),
    }
    dense = specs.MLP(c.hidden_size, c.intermediate_size)
    layers = (
        specs.Layer(norm, operators[kind], norm, dense if i < c.num_dense_layers else _moe(c))
        for i, kind in enumerate(c.layer_types)
    )
    return specs.Model(
        embed_tokens=specs.Embedding(c.vocab_size, c.hidden_size),
        layers=tuple(layers),
        last_rows=specs.LastRows(c.hidden_size),
        embedding_norm=norm,
        lm_head=specs.LMHead(c.vocab_size, c.hidden_size),
        tie_word_embeddings=tied,
    )


def _moe(c: ModelConfig) -> specs.SparseMoe:
    return specs.SparseMoe(
        specs.Router(
            c.hidden_size,
            c.num_experts,
            c.num_experts_per_tok,
            c.use_expert_bias,
            c.norm_topk_prob,
            c.routed_scaling_factor,
        ),
        specs.Experts(
            c.hidden_size,
            c.moe_intermediate_size,
            c.num_experts,
            c.num_experts_per_tok,
            range(c.num_experts),
        ),
    )


def _layer_types(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """`layer_types`, or what the older `full_attn_idxs` says of `num_hidden_layers`."""
    kinds = fields.get("layer_types")
    if kinds is None and fields.get("full_attn_idxs") is not None:
        return _layers_by_index(fields)
    if not isinstance(kinds, list) or not kinds:
        raise Lfm2kitError(f"layer_types is {kinds!r}; expected a list of one name per layer")
    for i, kind in enumerate(kinds):
        if kind not in (CONV, ATTENTION):
            raise Lfm2kitError(f"layer_types[{i}] is {kind!r}; there is: {CONV}, {ATTENTION}")
    count = fields.get("num_hidden_layers", len(kinds))
    if count != len(kinds):
        raise Lfm2kitError(f"num_hidden_layers is {count}, layer_types has {len(kinds)}")
    return tuple(kinds)


def _layers_by_index(fields: Mapping[str, Any]) -> tuple[str, ...]:
    attention = fields["full_attn_idxs"]
    layers = range(_whole(fields, "num_hidden_layers", most=MOST_LAYERS))
    if not isinstance(attention, list) or not all(i in layers for i in attention):
        raise Lfm2kitError(f"full_attn_idxs is {attention!r}; there are layers 0 to {layers[-1]}")
    return tuple(ATTENTION if i in attention else CONV for i in layers)


def _head_dim(fields: Mapping[str, Any], hidden_size: int, heads: int) -> int:
    if fields.get("head_dim") is not None:
        return _whole(fields, "head_dim")
    if hidden_size % heads:
        raise Lfm2kitError(f"hidden_size {hidden_size} is not a multiple of {heads} heads")
    return hidden_size // heads


def _rope_theta(fields: Mapping[str, Any]) -> float:
    """Flat `rope_theta`, or nested in `rope_parameters` (LFM2.5); no scaled rotary form."""
    for key in ("rope_parameters", "rope_scaling"):
        nested = fields.get(key)
        if nested is None:
            continue
        if not isinstance(nested, dict):
            raise Lfm2kitError(f"{key} is {nested!r}; expected an object")
        rope_type = nested.get("rope_type", nested.get("type", "default"))
        if rope_type != "default":
            raise Lfm2kitError(f"{key}.rope_type is {rope_type!r}; lfm2kit has 'default'")
        if nested.get("partial_rotary_factor", 1.0) != 1.0:
            raise Lfm2kitError(f"{key}.partial_rotary_factor is not 1; lfm2kit rotates whole heads")
        if "rope_theta" in nested:
            return _real(nested, "rope_theta", within=key)
    return _real(fields, "rope_theta")


def _tied(fields: Mapping[str, Any]) -> bool | None:
    """`tie_embedding` (LFM2's own key) or `tie_word_embeddings`; None where neither is there."""
    for key in ("tie_embedding", "tie_word_embeddings"):
        if fields.get(key) is not None:
            return _flag(fields, key)
    return None


def _value(fields: Mapping[str, Any], key: str, within: str = "") -> Any:
    if fields.get(key) is None:
        raise Lfm2kitError(f"key '{within + '.' if within else ''}{key}' is missing")
    return fields[key]


def _whole(fields: Mapping[str, Any], key: str, least: int = 1, most: int = 2**31 - 1) -> int:
    value = _value(fields, key)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise Lfm2kitError(f"{key} is {value!r}; expected a whole number from {least} to {most}")
    return value


def _real(fields: Mapping[str, Any], key: str, within: str = "") -> float:
    value = _value(fields, key, within)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not abs(value) < 1e30:  # false for NaN as well
        raise Lfm2kitError(f"{key} is {value!r}; expected a number")
    return float(value)


def _flag(fields: Mapping[str, Any], key: str) -> bool:
    value = _value(fields, key)
    if not isinstance(value, bool):
        raise Lfm2kitError(f"{key} is {value!r}; expected true or false")
    return value
