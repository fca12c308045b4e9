"""What a config.json may say, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lfm2kit import specs
from lfm2kit.checkpoint.config import LFM2_8B_A1B, model_spec, parse_config, read_config
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
