"""What a config.json may say, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lfm2kit import specs
from lfm2kit.checkpoint.config import LFM2_8B_A1B, model_spec, parse_config, read_config
from lfm2kit.checkpoint.convert import config_fields
from lfm2kit.errors import Lfm2kitError
from tests.core.small import FIELDS, config, small_spec


def test_lfm2_8b_a1b_has_the_published_tensors_and_parameters() -> None:
    spec = model_spec(LFM2_8B_A1B, tied=True)
    assert len(spec.parameters()) == 2302
    assert spec.weight_elements() == pytest.approx(8.34e9, rel=1e-3)


def test_the_theta_of_rope_is_read_flat_and_nested() -> None:
    nested = {k: v for k, v in FIELDS.items() if k != "rope_theta"}
    nested["rope_parameters"] = {"rope_theta": 5e6, "rope_type": "default"}
    assert config(rope_theta=1e6).rope_theta == 1e6
    assert parse_config(nested).rope_theta == 5e6


def test_a_missing_theta_is_an_error_and_never_a_default() -> None:
    with pytest.raises(Lfm2kitError, match="rope_theta"):
        parse_config({k: v for k, v in FIELDS.items() if k != "rope_theta"})


@pytest.mark.parametrize(
    "key",
    [k for k in FIELDS if k not in ("model_type", "num_hidden_layers", "tie_word_embeddings")],
)
def test_every_other_missing_key_is_named(key: str) -> None:
    with pytest.raises(Lfm2kitError, match=key):
        parse_config({k: v for k, v in FIELDS.items() if k != key})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "llama"),
        ("hidden_size", -3),
        ("hidden_size", "24"),
        ("hidden_size", True),
        ("hidden_size", 2**40),
        ("num_experts_per_tok", 6),
        ("num_key_value_heads", 3),
        ("head_dim", 5),
        ("norm_eps", float("nan")),
        ("norm_eps", 0.0),
        ("norm_topk_prob", 1),
        ("layer_types", []),
        ("layer_types", ["conv", "mamba", "conv", "conv"]),
        ("num_hidden_layers", 7),
        ("max_position_embeddings", 0),
        ("max_position_embeddings", "128000"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6}),
        ("rope_parameters", [1]),
        ("rope_scaling", {"type": "linear", "factor": 2}),
        ("hidden_act", "gelu"),
        ("block_use_swiglu", False),
        ("use_pos_enc", False),
        ("partial_rotary_factor", 0.5),
        ("transformers_weights", "other.safetensors"),
        ("hidden_size", 2**18),
        ("text_config", {"model_type": "lfm2_moe"}),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("quantization_config", {"load_in_4bit": True}),
        ("compression_config", {"format": "pack-quantized"}),
        ("quantization", {"bits": 4, "group_size": 64}),
        ("rope_scaling", {"rope_type": "default", "factor": 4.0}),
        ("rope_scaling", {"rope_theta": 5000.0, "partial_rotary_factor": 0.5}),
        ("rope_parameters", {"full_attention": {"rope_theta": 5000.0}}),
    ],
)
def test_an_unsupported_value_is_named(key: str, value: object) -> None:
    with pytest.raises(Lfm2kitError, match=key.split("_")[0]):
        config(**{key: value})


LFM25 = {"rope_theta": None, "rope_parameters": {"rope_theta": 5e6, "rope_type": "default"}}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({**LFM25, "rope_scaling": YARN}, ["rope_scaling.rope_type", "yarn"]),
        ({**LFM25, "rope_scaling": {"type": "linear", "factor": 2}}, ["rope_scaling", "linear"]),
        ({**LFM25, "rope_theta": 1e6}, ["rope_parameters.rope_theta", "rope_theta", "1000000.0"]),
        ({**LFM25, "rope_scaling": {"rope_theta": 1e6}}, ["rope_scaling.rope_theta", "1000000.0"]),
        ({**LFM25, "rope_scaling": {"rope_type": "default"}}, ["rope_scaling", "no rope_theta"]),
        ({"theta": 1e4}, ["rope_theta", "theta", "10000.0"]),
        ({"rope_parameters": {"rope_type": "default", "type": "yarn"}}, ["yarn"]),
        ({"tie_embedding": False}, ["tie_embedding", "tie_word_embeddings", "False"]),
        ({"num_hidden_layers": 7}, ["num_hidden_layers", "layer_types", "7", "4"]),
        ({"full_attn_idxs": [0, 3]}, ["full_attn_idxs", "layer_types"]),
        ({"block_dim": 25}, ["block_dim", "hidden_size", "25"]),
        ({"conv_dim": 25}, ["conv_dim", "hidden_size"]),
        ({"conv_dim_out": 25}, ["conv_dim_out", "hidden_size"]),
        ({"num_heads": 2}, ["num_heads", "num_attention_heads"]),
        ({"block_norm_eps": 1e-6}, ["block_norm_eps", "norm_eps"]),
        ({"rms_norm_eps": 1e-6}, ["rms_norm_eps", "norm_eps"]),
        ({"num_local_experts": 6}, ["num_local_experts", "num_experts"]),
    ],
)
def test_two_keys_that_say_one_thing_and_differ_are_both_named(
    changes: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(Lfm2kitError) as caught:
        config(**changes)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": None},
        {"rope_scaling": {}},
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 5000, "type": "default", "factor": 1.0}},
        {"rope_parameters": {"rope_theta": 5000.0}, "rope_scaling": {"rope_theta": 5000.0}},
        {"theta": 5000.0, "tie_embedding": True, "full_attn_idxs": [1, 3], "block_dim": 24},
        {"quantization_config": None, "text_config": None, "partial_rotary_factor": 1},
    ],
)
def test_two_keys_that_agree_are_one(changes: dict[str, object]) -> None:
    assert config(**changes) == config()


def all_layers(count: int, *attention: int) -> list[str]:
    return ["full_attention" if i in attention else "conv" for i in range(count)]


DENSE = {
    "model_type": "lfm2",
    "vocab_size": 65536,
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "conv_L_cache": 3,
    "conv_bias": False,
    "norm_eps": 1e-5,
    "rope_theta": 1e6,
    "block_auto_adjust_ff_dim": True,
    "block_ffn_dim_multiplier": 1.0,
    "block_multiple_of": 256,
}
SIXTEEN = {"num_hidden_layers": 16, "full_attn_idxs": [2, 5, 8, 10, 12, 14]}
LFM2_350M = {**DENSE, **SIXTEEN, "hidden_size": 1024, "num_attention_heads": 16}
LFM2_1_2B = {**DENSE, **SIXTEEN}
LFM2_2_6B = {**DENSE, "layer_types": all_layers(30, 2, 5, 9, 12, 15, 18, 21, 24)}
LFM25_8B_A1B = {
    **{k: v for k, v in config_fields(LFM2_8B_A1B).items() if k != "rope_theta"},
    "vocab_size": 128000,
    "rope_parameters": {"rope_theta": 5000000.0, "rope_type": "default"},
}
LFM2_24B_A2B = {
    **config_fields(LFM2_8B_A1B),
    "layer_types": all_layers(40, *range(2, 40, 4)),
    "num_hidden_layers": 40,
    "intermediate_size": 11776,
    "moe_intermediate_size": 1536,
    "num_experts": 64,
}


@pytest.mark.parametrize(
    ("fields", "width", "parameters"),
    [
        ({**LFM2_350M, "block_ff_dim": 6656}, 4608, 354e6),
        ({**LFM2_1_2B, "block_ff_dim": 12288}, 8192, 1.17e9),
        ({**LFM2_1_2B, "intermediate_size": 12288}, 8192, 1.17e9),
        ({**LFM2_1_2B, "block_ff_dim": 12288, "intermediate_size": 12288}, 8192, 1.17e9),
        ({**LFM2_1_2B, "block_ff_dim": 12288, "intermediate_size": 8192}, 8192, 1.17e9),
        (
            {**LFM2_2_6B, "block_auto_adjust_ff_dim": False, "intermediate_size": 10752},
            10752,
            2.57e9,
        ),
        (LFM25_8B_A1B, 7168, 8.47e9),
        (LFM2_24B_A2B, 11776, 23.8e9),
    ],
)
def test_published_models_have_their_widths_and_parameters(
    fields: dict[str, object], width: int, parameters: float
) -> None:
    config = parse_config(fields)
    assert config.intermediate_size == width
    spec = model_spec(config, tied=True)
    assert spec.weight_elements() == pytest.approx(parameters, rel=5e-3)
    assert config.num_dense_layers == (
        2 if fields["model_type"] == "lfm2_moe" else len(spec.layers)
    )


def test_a_multiplier_of_null_turns_the_rounding_off() -> None:
    fields = {**LFM2_1_2B, "block_ff_dim": 1000, "block_ffn_dim_multiplier": None}
    assert parse_config(fields).intermediate_size == 666


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"intermediate_size": 9000}, ["block_ff_dim is 12288", "intermediate_size is 9000"]),
        ({"block_auto_adjust_ff_dim": None}, ["'block_auto_adjust_ff_dim' is missing"]),
        ({"block_auto_adjust_ff_dim": 1}, ["block_auto_adjust_ff_dim is 1"]),
        ({"block_ff_dim": None}, ["'intermediate_size' is missing"]),
        ({"block_ff_dim": 2**20 + 1}, ["block_ff_dim is 1048577"]),
        ({"block_ff_dim": 1, "block_ffn_dim_multiplier": None}, ["block_ff_dim is 0"]),
        ({"block_ffn_dim_multiplier": 900.0}, ["the adjusted block_ff_dim is 7372800"]),
        ({"block_ffn_dim_multiplier": 0}, ["block_ffn_dim_multiplier is 0"]),
        ({"block_multiple_of": 0}, ["block_multiple_of is 0"]),
        ({"block_multiple_of": None}, ["'block_multiple_of' is missing"]),
    ],
)
def test_a_width_that_a_dense_config_cannot_mean_is_named(
    changes: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(Lfm2kitError) as caught:
        parse_config({**LFM2_1_2B, "block_ff_dim": 12288, **changes})
    for word in words:
        assert word in str(caught.value)


def test_a_multiplier_that_is_not_there_is_named() -> None:
    fields = {**LFM2_1_2B, "block_ff_dim": 12288}
    del fields["block_ffn_dim_multiplier"]
    with pytest.raises(Lfm2kitError, match="'block_ffn_dim_multiplier' is missing"):
        parse_config(fields)


def test_layers_come_in_the_order_of_layer_types_dense_first() -> None:
    layers = small_spec().layers
    assert [type(layer.operator) for layer in layers] == [
        specs.ShortConv,
        specs.Attention,
        specs.ShortConv,
        specs.Attention,
    ]
    assert [type(layer.feed_forward) for layer in layers] == [specs.MLP] * 2 + [specs.SparseMoe] * 2


def test_dense_and_sparse_only_models_need_not_say_what_they_lack() -> None:
    dense = {k: v for k, v in FIELDS.items() if "expert" not in k or k == "use_expert_bias"}
    assert parse_config({**dense, "num_dense_layers": 4}).num_experts == 0
    sparse = {k: v for k, v in FIELDS.items() if k != "intermediate_size"}
    assert parse_config({**sparse, "num_dense_layers": 0}).intermediate_size == 0


@pytest.mark.parametrize("text", ["", "[1]", "{", '"x"', "\x00", "[" * 100_000])
def test_a_file_that_is_no_config_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(Lfm2kitError, match=r"config\.json") as caught:
        read_config(path)
    assert "\n" not in str(caught.value)


def test_a_config_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(FIELDS))
    assert read_config(path) == config()


def test_the_longest_sequence_is_known_where_the_file_says_it() -> None:
    assert small_spec(max_position_embeddings=128000).max_position_embeddings == 128000
    assert small_spec(max_position_embeddings=None).max_position_embeddings is None
    assert small_spec().max_position_embeddings is None
