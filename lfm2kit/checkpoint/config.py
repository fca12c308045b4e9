"""The checkpoint's config.json under its own field names, and the specs that it describes.

Two keys with the same meaning must agree (docs/decisions/0008-reading-checkpoints.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as brief  # of what a file says, however long it is
from typing import Any

from lfm2kit import bounds, specs
from lfm2kit.checkpoint import quantised
from lfm2kit.checkpoint.documents import read_json
from lfm2kit.errors import Lfm2kitError

CONV, ATTENTION = "conv", "full_attention"
MOE, DENSE = "lfm2_moe", "lfm2"  # types of model: in the second, every layer is dense

# Other names of keys in files of this family.  If both names are there, their values must be equal.
# The first six names are older LFM2's.
TWINS: Mapping[str, str] = {
    "block_dim": "hidden_size",
    "conv_dim": "hidden_size",
    "conv_dim_out": "hidden_size",
    "num_heads": "num_attention_heads",
    "block_norm_eps": "norm_eps",
    "tie_embedding": "tie_word_embeddings",
    "rms_norm_eps": "norm_eps",
    "num_local_experts": "num_experts",
}

# Keys for which lfm2kit supports a single value, and what to say about any other.
FIXED: Mapping[str, tuple[Any, str]] = {
    "hidden_act": ("silu", " as the activation"),
    "block_use_swiglu": (True, ", a gated feed-forward"),
    "use_pos_enc": (True, ", rotary positions in every attention"),
    "partial_rotary_factor": (1.0, ", the rotation of whole heads"),
    "transformers_weights": ("model.safetensors", "; rename the file of weights"),
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A configuration of type `lfm2_moe`, or `lfm2`, whose layers are all dense.

    Nothing is filled in from another library's class defaults: those are not this model's (32
    layers, eos 2).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int  # the width of the weights: an `lfm2` file may say another
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
    max_position_embeddings: int | None = None  # None: the file does not say

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
    max_position_embeddings=128000,
)


def read_config(path: Path) -> ModelConfig:
    """Return the configuration in a config.json; `Lfm2kitError` where it cannot be run."""
    fields = read_json(path)
    try:
        return parse_config(fields)
    except Lfm2kitError as error:
        raise Lfm2kitError(f"{path}: ", *error.args) from None


def parse_config(fields: Mapping[str, Any]) -> ModelConfig:
    """Return the configuration that config.json's keys describe; `Lfm2kitError` names a bad key."""
    _check_form(fields)
    _check_twins(fields)
    layer_types = _layer_types(fields)
    hidden_size = _whole(fields, "hidden_size")
    heads = _whole(fields, "num_attention_heads")
    dense = _dense_layers(fields, len(layer_types))
    sparse = dense < len(layer_types)
    config = ModelConfig(
        vocab_size=_whole(fields, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_dense_width(fields) if dense else 0,
        moe_intermediate_size=_whole(fields, "moe_intermediate_size") if sparse else 0,
        layer_types=layer_types,
        num_attention_heads=heads,
        num_key_value_heads=_whole(fields, "num_key_value_heads"),
        head_dim=_head_dim(fields, hidden_size, heads),
        num_dense_layers=dense,
        num_experts=_whole(fields, "num_experts") if sparse else 0,
        num_experts_per_tok=_whole(fields, "num_experts_per_tok") if sparse else 0,
        norm_topk_prob=sparse and _flag(fields, "norm_topk_prob"),
        use_expert_bias=sparse and _flag(fields, "use_expert_bias"),
        routed_scaling_factor=_real(fields, "routed_scaling_factor") if sparse else 1.0,
        conv_L_cache=_whole(fields, "conv_L_cache"),
        conv_bias=_flag(fields, "conv_bias"),
        norm_eps=_real(fields, "norm_eps"),
        rope_theta=_rope_theta(fields),
        tie_word_embeddings=_tied(fields),
        max_position_embeddings=_max_positions(fields),
    )
    bounds.check_tensors(model_spec(config, tied=True))  # specs refuse what does not fit together
    return config


def model_spec(config: ModelConfig, *, tied: bool) -> specs.Model:
    """Return the specs of `config`'s model; `tied` says whose weight the head reads."""
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
        max_position_embeddings=c.max_position_embeddings,
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
            tuple(range(c.num_experts)),
        ),
    )


def _check_form(fields: Mapping[str, Any]) -> None:
    """Refuse settings that would need another model than the one lfm2kit has."""
    if (sentence := quantised.said_by_config(fields)) is not None:
        raise Lfm2kitError(sentence)
    if fields.get("text_config") is not None:
        raise Lfm2kitError("text_config is a model within this one; give the text model's folder")
    if fields.get("model_type") not in (MOE, DENSE, None):
        raise Lfm2kitError(
            f"model_type is {brief(fields['model_type'])}; lfm2kit supports only {MOE!r} and "
            f"{DENSE!r}; give a model of such a type"
        )
    for key, (value, advice) in FIXED.items():
        if fields.get(key, value) not in (value, None):
            raise Lfm2kitError(
                f"{key} is {brief(fields[key])}; lfm2kit supports only {value!r}{advice}"
            )


def _check_twins(fields: Mapping[str, Any]) -> None:
    """Refuse two keys with one meaning and different values: readers differ in which they take."""
    for twin, key in TWINS.items():
        _check_equal(twin, fields.get(twin), key, fields.get(key))


def _check_equal(key: str, value: Any, other_key: str, other: Any) -> None:
    if value is not None and other is not None and value != other:
        raise Lfm2kitError(
            f"{key} is {brief(value)}, {other_key} is {brief(other)}: they say the same thing; "
            "keep the one that is right"
        )


def _layer_types(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Return `layer_types`, or what the older `full_attn_idxs` says of `num_hidden_layers`."""
    kinds = fields.get("layer_types")
    by_index = None if fields.get("full_attn_idxs") is None else _layers_by_index(fields)
    if kinds is None and by_index is not None:
        return by_index
    if not isinstance(kinds, list) or not 1 <= len(kinds) <= bounds.LAYERS:
        raise Lfm2kitError(
            f"layer_types is {brief(kinds)}; expected a list of 1 to {bounds.LAYERS} names"
        )
    for i, kind in enumerate(kinds):
        if kind not in (CONV, ATTENTION):
            raise Lfm2kitError(f"layer_types[{i}] is {brief(kind)}; available: {CONV}, {ATTENTION}")
    count = fields.get("num_hidden_layers")
    if count is not None and count != len(kinds):
        raise Lfm2kitError(f"num_hidden_layers is {brief(count)}, layer_types has {len(kinds)}")
    if by_index is not None and by_index != tuple(kinds):
        raise Lfm2kitError("full_attn_idxs and layer_types differ; keep the one that is right")
    return tuple(kinds)


def _layers_by_index(fields: Mapping[str, Any]) -> tuple[str, ...]:
    attention = fields["full_attn_idxs"]
    layers = range(_whole(fields, "num_hidden_layers"))
    is_list = isinstance(attention, list) and len(attention) <= len(layers)
    if not is_list or not all(i in layers for i in attention):
        raise Lfm2kitError(
            f"full_attn_idxs is {brief(attention)}; there are layers 0 to {layers[-1]}"
        )
    return tuple(ATTENTION if i in attention else CONV for i in layers)


def _dense_layers(fields: Mapping[str, Any], layers: int) -> int:
    """Return how many of the first layers are dense.

    All, at most: a model cut short keeps the number of the whole one.
    """
    if fields.get("model_type") == DENSE:
        return layers
    return min(_whole(fields, "num_dense_layers", least=0), layers)


def _dense_width(fields: Mapping[str, Any]) -> int:
    """Return the width of dense layers' weights, which an `lfm2` file need not say itself.

    Its older key `block_ff_dim` must agree with `intermediate_size`; some files say there what
    results from it.
    """
    if fields.get("model_type") != DENSE:
        return _whole(fields, "intermediate_size")
    older, newer = fields.get("block_ff_dim"), fields.get("intermediate_size")
    key = "intermediate_size" if older is None else "block_ff_dim"
    width = _adjusted(fields, bounds.whole(key, "intermediate_size", _value(fields, key)))
    if newer != width:
        _check_equal("block_ff_dim", older, "intermediate_size", newer)
    return width


def _adjusted(fields: Mapping[str, Any], width: int) -> int:
    """Return the width that transformers makes of an `lfm2` file's: two thirds, rounded up.

    There the file turns it off by `block_auto_adjust_ff_dim`, and the rounding by a multiplier of
    null.
    """
    if not _flag(fields, "block_auto_adjust_ff_dim"):
        return width
    width = int(2 * width / 3)
    if fields.get("block_ffn_dim_multiplier", "missing") is not None:
        multiple = _whole(fields, "block_multiple_of")
        width = int(_real(fields, "block_ffn_dim_multiplier") * width)
        width = multiple * -(-width // multiple)
    return bounds.whole("the adjusted block_ff_dim", "intermediate_size", width)


def _head_dim(fields: Mapping[str, Any], hidden_size: int, heads: int) -> int:
    if fields.get("head_dim") is not None:
        return _whole(fields, "head_dim")
    if hidden_size % heads:
        raise Lfm2kitError(f"hidden_size {hidden_size} is not a multiple of {heads} heads")
    return bounds.whole("hidden_size / num_attention_heads", "head_dim", hidden_size // heads)


def _rope_theta(fields: Mapping[str, Any]) -> float:
    """Return the base of the rotary angles; refuse every scaled form of RoPE."""
    found = _thetas(fields)
    if not found:
        raise Lfm2kitError("keys 'rope_theta' and 'rope_parameters.rope_theta' are both missing")
    if fields.get("rope_scaling") and list(found) == ["rope_parameters.rope_theta"]:
        raise Lfm2kitError(
            "rope_scaling has no rope_theta, and transformers takes it in place of "
            "rope_parameters; leave rope_scaling out"
        )
    (key, theta), *others = found.items()
    for other_key, other in others:
        _check_equal(key, theta, other_key, other)
    return bounds.real(key, "rope_theta", theta)


def _thetas(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return every theta by its key: nested (LFM2.5), flat, and under older LFM2's name.

    Model cards tell users to add `rope_scaling` for long contexts.
    """
    found = {}
    for key in ("rope_parameters", "rope_scaling"):
        nested = fields.get(key)
        if nested is None:
            continue
        _check_unscaled(key, nested)
        if nested.get("rope_theta") is not None:
            found[f"{key}.rope_theta"] = nested["rope_theta"]
    return found | {k: fields[k] for k in ("rope_theta", "theta") if fields.get(k) is not None}


def _check_unscaled(key: str, nested: Any) -> None:
    """Refuse a form of RoPE other than the default, and name it."""
    if not isinstance(nested, dict):
        raise Lfm2kitError(f"{key} is {brief(nested)}; expected an object")
    for name, value in nested.items():
        if isinstance(value, dict):
            raise Lfm2kitError(
                f"{key}.{name} is an object; lfm2kit supports one RoPE for all layers"
            )
    types = [nested[name] for name in ("rope_type", "type") if nested.get(name) is not None]
    for rope_type in types:
        if rope_type != "default":
            raise Lfm2kitError(
                f"{key}.rope_type is {brief(rope_type)}; lfm2kit supports only 'default': remove "
                f"{key} from config.json to run with unscaled positions"
            )
    for name in ("factor", "partial_rotary_factor"):
        if nested.get(name) not in (None, 1):
            raise Lfm2kitError(
                f"{key}.{name} is {brief(nested[name])}; lfm2kit supports only unscaled RoPE over "
                "whole heads"
            )


def _tied(fields: Mapping[str, Any]) -> bool | None:
    """Return `tie_embedding` (LFM2's own key) or `tie_word_embeddings`; None if neither exists."""
    for key in ("tie_embedding", "tie_word_embeddings"):
        if fields.get(key) is not None:
            return _flag(fields, key)
    return None


def _value(fields: Mapping[str, Any], key: str) -> Any:
    if fields.get(key) is None:
        raise Lfm2kitError(f"key '{key}' is missing")
    return fields[key]


def _max_positions(fields: Mapping[str, Any]) -> int | None:
    key = "max_position_embeddings"
    return None if fields.get(key) is None else _whole(fields, key)


def _whole(fields: Mapping[str, Any], key: str, least: int = 1) -> int:
    return bounds.whole(key, key, _value(fields, key), least)


def _real(fields: Mapping[str, Any], key: str) -> float:
    return bounds.real(key, key, _value(fields, key))


def _flag(fields: Mapping[str, Any], key: str) -> bool:
    value = _value(fields, key)
    if not isinstance(value, bool):
        raise Lfm2kitError(f"{key} is {brief(value)}; expected true or false")
    return value
