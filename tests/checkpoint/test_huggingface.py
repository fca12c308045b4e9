"""Hugging Face folders: an index and its shards, packed experts, tied heads, what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm2kit.checkpoint import open_checkpoint
from lfm2kit.checkpoint.convert import write_checkpoint
from lfm2kit.checkpoint.huggingface import read_folder
from lfm2kit.checkpoint.names import EMBEDDING, HEAD, INDEX, SINGLE, SPECS
from lfm2kit.checkpoint.synth import random_source
from lfm2kit.errors import Lfm2kitError
from lfm2kit.formats import BF16
from lfm2kit.weights import Tensor
from tests.checkpoint.attempt import content
from tests.checkpoint.folders import (
    ORACLE,
    Change,
    Tensors,
    change_json,
    change_tensors,
    copied,
    ones,
    write_tensors,
)
from tests.checkpoint.test_spec_files import SMALL
from tests.core.small import FIELDS, small_spec

EXPERTS = "model.layers.1.feed_forward.experts"
FIRST, SECOND, LAST = (f"model-0000{i}-of-00009.safetensors" for i in (1, 2, 9))


def refused(path: Path, *words: str) -> None:
    """Check that opening `path` fails with one line that has its name and all the words in it."""
    with pytest.raises(Lfm2kitError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    for word in [str(path), *words]:
        assert word in message
    assert "\n" not in message


# ---- one file ----


def test_experts_packed_and_apart_agree_bit_for_bit() -> None:
    apart = open_checkpoint(ORACLE / "experts_stored_apart")
    packed = open_checkpoint(ORACLE / "experts_stored_packed")
    assert content(apart.weights) == content(packed.weights)


def test_experts_are_views_of_the_packed_tensor() -> None:
    tensors = read_folder(ORACLE / "experts_stored_packed")
    assert not tensors["layers.1.feed_forward.experts.3.w3.weight"].data.flags.owndata


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return copied("experts_stored_packed", tmp_path / "packed")


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        (
            "gate_up_proj",
            (8, 31, 24),
            ["gate_up_proj", "[8, 31, 24]", "[experts, 2 * rows, columns]"],
        ),
        (
            "gate_up_proj",
            (8, 32 * 24),
            ["gate_up_proj", "[8, 768]", "[experts, 2 * rows, columns]"],
        ),
        ("gate_up_proj", (), ["gate_up_proj", "[]", "[experts, 2 * rows, columns]"]),
        ("down_proj", (24, 16), ["down_proj", "[24, 16]", "[experts, rows, columns]"]),
        ("down_proj", (8, 16, 24), ["experts.0.w2.weight", "[16, 24]", "[24, 16]"]),
        ("down_proj", (7, 24, 16), ["experts.7.w2.weight"]),
        ("down_proj", (9, 24, 16), ["experts.8.w2.weight", "no place"]),
        ("down_proj", (0, 24, 16), ["down_proj", "[experts, rows, columns]"]),
        ("down_proj", (2**40, 0, 16), ["down_proj", "dimensions up to 2147483647"]),
        ("down_proj", (1025, 1, 1), ["down_proj", "up to 1024 experts"]),
    ],
)
def test_packed_experts_of_another_shape_are_refused(
    packed: Path, name: str, shape: tuple[int, ...], words: list[str]
) -> None:
    data = np.zeros(shape, np.float32)
    changed = {f"{EXPERTS}.{name}": Tensor.of_array("", data)}
    change_tensors(packed, lambda tensors: tensors.update(changed))
    refused(packed, *words)


def test_an_expert_both_packed_and_apart_is_refused(packed: Path) -> None:
    twice = {f"{EXPERTS}.2.w2.weight": ones(24, 16)}
    change_tensors(packed, lambda tensors: tensors.update(twice))
    refused(packed, "experts.2.w2.weight", "a second time")


def test_a_name_with_and_without_the_prefix_is_refused(packed: Path) -> None:
    change_tensors(packed, lambda tensors: tensors.update({"embedding_norm.weight": ones(24)}))
    refused(packed, "embedding_norm.weight", "a second time")


@pytest.fixture
def apart(tmp_path: Path) -> Path:
    return copied("experts_stored_apart", tmp_path / "experts_stored_apart")


def without(name: str) -> Change:
    def change(tensors: Tensors) -> None:
        del tensors[name]

    return change


def with_ones(name: str, *shape: int) -> Change:
    return lambda tensors: tensors.update({name: ones(*shape)})


def renamed(old: str, new: str) -> Change:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def emptied(tensors: Tensors) -> None:
    tensors.clear()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("model.embedding_norm.weight"), ["no tensor 'embedding_norm.weight'"]),
        (without("model.layers.1.feed_forward.expert_bias"), ["layers.1.feed_forward.expert_bias"]),
        (without("model.embed_tokens.weight"), ["no tensor 'embed_tokens.weight'"]),
        (without(f"{EXPERTS}.7.w3.weight"), ["no tensor", "experts.7.w3.weight"]),
        (emptied, ["no tensor 'embed_tokens.weight'"]),
        (with_ones("model.layers.0.conv.in_proj.bias", 72), ["no place", "conv.in_proj.bias"]),
        (with_ones("model.layers.4.ffn_norm.weight", 24), ["no place", "layers.4.ffn_norm"]),
        (with_ones(f"{EXPERTS}.8.w1.weight", 16, 24), ["no place", "experts.8.w1.weight"]),
        (with_ones("vision_tower.weight", 3), ["no place", "vision_tower.weight"]),
        (with_ones("model.embedding_norm.weight", 25), ["embedding_norm", "[25]", "[24]"]),
        (with_ones("model.embedding_norm.weight"), ["embedding_norm", "shape []", "[24]"]),
        (with_ones("model.layers.0.conv.conv.weight", 24, 3), ["conv.conv", "[24, 3]"]),
        (with_ones("model.layers.0.conv.conv.weight", 24, 1, 4), ["conv.conv", "[24, 1, 4]"]),
        (
            renamed("model.layers.0.feed_forward.w1.weight", "model.layers.0.feed_forward.gate_pr"),
            ["no tensor 'layers.0.feed_forward.w1.weight'", "layers.0.feed_forward.gate_pr"],
        ),
    ],
)
def test_a_tensor_missing_left_over_or_misshapen_is_named(
    apart: Path, change: Change, words: list[str]
) -> None:
    change_tensors(apart, change)
    refused(apart, *words)


def head_like_embedding(tensors: Tensors) -> None:
    tensors[HEAD] = tensors[f"model.{EMBEDDING}"]


def head_in_bfloat16(tensors: Tensors) -> None:
    """Store a head in BF16, and an embedding of the same values in F32."""
    bits = (np.arange(80 * 24) % 99 + 0x3F80).astype(np.uint16).reshape(80, 24)
    tensors[HEAD] = Tensor.of_array("", bits, BF16)
    tensors[f"model.{EMBEDDING}"] = Tensor.of_array("", tensors[HEAD].float32())


def other_head(tensors: Tensors) -> None:
    data = np.array(tensors[f"model.{EMBEDDING}"].data)
    data[-1, -1] += 1
    tensors[HEAD] = Tensor.of_array("", data)


@pytest.mark.parametrize("change", [head_like_embedding, head_in_bfloat16])
@pytest.mark.parametrize("key", ["tie_word_embeddings", "tie_embedding"])
def test_a_tied_model_may_store_the_embedding_again_as_its_head(
    apart: Path, change: Change, key: str
) -> None:
    change_json(apart / "config.json", **{"tie_word_embeddings": None, key: True})
    change_tensors(apart, change)
    checkpoint = open_checkpoint(apart)
    assert checkpoint.spec.tie_word_embeddings
    assert HEAD not in checkpoint.weights


@pytest.mark.parametrize("change", [other_head, with_ones(HEAD, 79, 24), with_ones(HEAD)])
def test_a_tied_model_with_another_head_is_refused(apart: Path, change: Change) -> None:
    change_tensors(apart, change)
    refused(apart, "tied", HEAD, "differs")


def test_a_scalar_for_embedding_and_head_is_misshapen(apart: Path) -> None:
    change_tensors(apart, with_ones(f"model.{EMBEDDING}"))
    change_tensors(apart, with_ones(HEAD))
    refused(apart, EMBEDDING, "shape []")


def test_a_stored_head_tells_where_the_config_does_not(apart: Path) -> None:
    change_json(apart / "config.json", tie_word_embeddings=None)
    assert open_checkpoint(apart).spec.tie_word_embeddings
    change_tensors(apart, other_head)
    checkpoint = open_checkpoint(apart)
    assert not checkpoint.spec.tie_word_embeddings
    assert checkpoint.weights[HEAD].data[-1, -1] != checkpoint.weights[EMBEDDING].data[-1, -1]


def test_an_untied_model_without_its_head_is_refused(apart: Path) -> None:
    change_json(apart / "config.json", tie_word_embeddings=False)
    refused(apart, f"no tensor '{HEAD}'")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "lfm3"}, ["model_type", "'lfm3'", "'lfm2_moe' and 'lfm2'"]),
        ({"model_type": "lfm2"}, ["block_auto_adjust_ff_dim"]),
        ({"num_experts": 9}, ["[8, 24]", "[9, 24]"]),
        ({"num_experts": 2**31 - 1}, ["num_experts", "2147483647"]),
        ({"num_experts_per_tok": 9}, ["9", "8"]),
        ({"num_dense_layers": 2}, ["layers.1.feed_forward"]),
        ({"use_expert_bias": False}, ["no place", "expert_bias"]),
        ({"conv_bias": True}, ["no tensor", "bias"]),
        ({"conv_L_cache": 4}, ["conv.conv", "[24, 1, 3]", "[24, 1, 4]"]),
        ({"num_key_value_heads": 4}, ["k_proj"]),
        ({"vocab_size": 81}, ["embed_tokens", "[80, 24]", "[81, 24]"]),
        ({"rope_scaling": {"rope_type": "yarn"}}, ["rope_type", "'yarn'"]),
        ({"layer_types": ["conv"] * 3 + ["sliding_attention"]}, ["sliding_attention"]),
        ({"layer_types": None, "num_hidden_layers": 2**31 - 1}, ["layer_types"]),
        (
            {"layer_types": None, "full_attn_idxs": [], "num_hidden_layers": 2**31 - 1},
            ["num_hidden_layers", "2147483647"],
        ),
        ({"layer_types": None, "full_attn_idxs": [[1]]}, ["full_attn_idxs"]),
        ({"layer_types": None, "full_attn_idxs": [1, 4]}, ["full_attn_idxs"]),
        ({"layer_types": None, "full_attn_idxs": [1, -3]}, ["full_attn_idxs"]),
        ({"hidden_size": 10**400}, ["hidden_size"]),
    ],
)
def test_a_config_that_cannot_be_run_or_does_not_fit_is_one_line(
    apart: Path, changes: dict[str, Any], words: list[str]
) -> None:
    change_json(apart / "config.json", **changes)
    refused(apart, *words)


def test_a_number_of_5000_digits_in_the_config_is_one_line(apart: Path) -> None:
    (apart / "config.json").write_text('{"vocab_size": ' + "1" * 5000 + "}")
    refused(apart, "config.json", "digits")


def test_the_older_full_attn_idxs_says_the_same_as_layer_types(apart: Path) -> None:
    change_json(apart / "config.json", layer_types=None, full_attn_idxs=[1, 3])
    assert open_checkpoint(apart).spec == open_checkpoint(ORACLE / apart.name).spec


def test_a_config_and_a_toml_file_must_describe_one_model(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_checkpoint(random_source(FIELDS), folder)
    (folder / SPECS).write_text(SMALL)
    assert open_checkpoint(folder).spec == small_spec()
    (folder / SPECS).write_text(SMALL.replace("rope_theta = 5000", "rope_theta = 6000"))
    refused(folder, "config.json", SPECS, "two models")


# ---- an index and its shards ----


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return copied("odd_sharded", tmp_path / "sharded")


def test_shards_give_the_same_bits_as_one_file(sharded: Path, tmp_path: Path) -> None:
    whole = copied("odd_sharded", tmp_path / "whole")
    tensors = {f"model.{name}": t for name, t in read_folder(sharded).items()}
    for path in whole.glob("model*"):
        path.unlink()
    write_tensors(whole / SINGLE, tensors)
    assert content(open_checkpoint(whole).weights) == content(open_checkpoint(sharded).weights)


def change_map(sharded: Path, **shards: str | None) -> None:
    """Say of tensors, without `model.` and `.weight`, that they are in other shards."""
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"] |= {f"model.{name}.weight": shard for name, shard in shards.items()}
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v is not None}
    (sharded / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "shard",
    [
        "../sharded/" + FIRST,
        "..",
        ".",
        "/etc/passwd",
        "/" + FIRST,
        "./" + FIRST,
        "sub/" + FIRST,
        FIRST + "/",
        "",
    ],
)
def test_a_shard_that_is_no_plain_file_name_is_refused(sharded: Path, shard: str) -> None:
    change_map(sharded, embed_tokens=shard)
    refused(sharded, INDEX, f"'{shard}'")


@pytest.mark.parametrize("shard", ["nowhere.safetensors", "x" * 300, "nul\0byte"])
def test_a_shard_that_is_not_there_is_named(sharded: Path, shard: str) -> None:
    change_map(sharded, embed_tokens=shard)
    refused(sharded, shard)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    refused(sharded, SECOND, "No such file")


def test_a_truncated_shard_is_named_with_its_tensor(sharded: Path) -> None:
    path = sharded / LAST
    path.write_bytes(path.read_bytes()[:-1])
    refused(sharded, LAST, "embedding_norm.weight", "truncated")


def test_a_tensor_that_the_shard_lacks_is_named(sharded: Path) -> None:
    change_map(sharded, invented=FIRST)
    refused(sharded, FIRST, "model.invented.weight", INDEX)


def test_a_tensor_that_the_index_lacks_is_named(sharded: Path) -> None:
    change_map(sharded, embed_tokens=None)
    refused(sharded, FIRST, "model.embed_tokens.weight", "nowhere")


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    again = {f"model.{EMBEDDING}": ones(80, 24)}
    change_tensors(sharded, lambda tensors: tensors.update(again), SECOND)
    refused(sharded, SECOND, f"model.{EMBEDDING}", FIRST)


def test_a_tensor_twice_in_the_index_is_refused(sharded: Path) -> None:
    text = (sharded / INDEX).read_text()
    twice = f'"weight_map": {{"model.{EMBEDDING}": "{SECOND}",'
    (sharded / INDEX).write_text(text.replace('"weight_map": {', twice))
    refused(sharded, INDEX, f"'model.{EMBEDDING}' twice")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "\x00",
        "[]",
        "null",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": []}',
        '{"weight_map": {"model.embed_tokens.weight": 3}}',
        '{"weight_map": {"model.embed_tokens.weight": null}}',
        "[" * 100_000,
        "1" * 5000,
    ],
)
def test_an_index_that_is_none_is_one_line(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    refused(sharded, INDEX)


def test_an_index_that_is_no_text_or_no_file_is_one_line(sharded: Path) -> None:
    (sharded / INDEX).write_bytes(b'{"weight_map": "\xff"}')
    refused(sharded, INDEX, "utf-8")
    (sharded / INDEX).unlink()
    (sharded / INDEX).mkdir()
    refused(sharded, INDEX, "directory")


def test_a_folder_without_tensors_says_what_it_lacks(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    refused(sharded, SINGLE, INDEX)
