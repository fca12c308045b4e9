"""Conversion both ways to the same bits; what it replaces, refuses and leaves behind."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm2kit.checkpoint import Checkpoint, open_checkpoint, pieces
from lfm2kit.checkpoint.config import parse_config
from lfm2kit.checkpoint.convert import Source, source_of, write_checkpoint
from lfm2kit.checkpoint.names import HEAD, INDEX, SINGLE
from lfm2kit.checkpoint.pieces import PIECE
from lfm2kit.checkpoint.safetensors import header_bytes, read_safetensors
from lfm2kit.checkpoint.synth import random_source
from lfm2kit.errors import Lfm2kitError
from lfm2kit.formats import BF16, F16, F32, Format
from lfm2kit.measuring.samples import write_inputs
from lfm2kit.outputs import folders
from lfm2kit.weights import Tensor
from tests.checkpoint.attempt import Content, content
from tests.checkpoint.folders import ORACLE, change_json, copied
from tests.checkpoint.typed import Cli
from tests.core.small import FIELDS

CASES = sorted(path.name for path in ORACLE.iterdir())
CASE = "experts_stored_apart"


def snapshot(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }


def source(case: str = CASE) -> Source:
    return source_of(open_checkpoint(ORACLE / case))


def bits(checkpoint: Checkpoint) -> Content:
    return content(checkpoint.weights)


# ---- both ways ----


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_gives_the_same_bits(case: str, tmp_path: Path) -> None:
    there, back = tmp_path / "model.bin", tmp_path / "back"
    original = open_checkpoint(ORACLE / case)
    write_checkpoint(source_of(original), there)
    write_checkpoint(source_of(open_checkpoint(there)), back)
    returned = open_checkpoint(back)
    assert returned.config == original.config
    for name, tensor in original.weights.items():
        assert returned.weights[name].format == F32
        assert returned.weights[name].float32().tobytes() == tensor.float32().tobytes()


@pytest.mark.parametrize("case", ["router_bias_stays_float32", "odd_stored_as_f16"])
def test_16_bit_types_survive_the_way_through_float32(case: str, tmp_path: Path) -> None:
    original = open_checkpoint(ORACLE / case)
    write_checkpoint(source_of(original), tmp_path / "model.bin")
    stored = F16 if "f16" in case else BF16
    write_checkpoint(source_of(open_checkpoint(tmp_path / "model.bin")), tmp_path / "back", stored)
    assert bits(open_checkpoint(tmp_path / "back")) == bits(original)


@pytest.mark.parametrize("format", [F16, BF16], ids=str)
def test_the_bias_of_the_router_is_never_narrowed(format: Format, tmp_path: Path) -> None:
    original = source("router_bias_stays_float32")
    write_checkpoint(original, tmp_path / "narrow", format)
    narrow = open_checkpoint(tmp_path / "narrow").weights
    name = "layers.1.feed_forward.expert_bias"
    assert narrow[name].format == F32
    np.testing.assert_array_equal(narrow[name].data, original.tensor(name).data)
    assert narrow["layers.1.feed_forward.gate.weight"].format == format


@pytest.mark.parametrize("max_shard", [1, 20_000, 10**9])
def test_shards_of_any_size_hold_the_same_model(max_shard: int, tmp_path: Path) -> None:
    write_checkpoint(source(), tmp_path / "shards", max_shard=max_shard)
    assert bits(open_checkpoint(tmp_path / "shards")) == bits(open_checkpoint(ORACLE / CASE))
    assert (tmp_path / "shards" / INDEX).exists() == (max_shard < 10**9)


def test_names_on_disk_are_hugging_faces(tmp_path: Path) -> None:
    write_checkpoint(source("odd_untied_attention_first"), tmp_path / "there")
    written = read_safetensors(tmp_path / "there" / SINGLE)
    assert written.keys() == read_safetensors(ORACLE / "odd_untied_attention_first" / SINGLE).keys()
    assert HEAD in written
    assert all(name.startswith("model.") for name in written if name != HEAD)


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        (1 + 2.0**-8, 0x3F80),  # halfway: to even, which is down
        (1 + 3 * 2.0**-8, 0x3F82),  # halfway: to even, which is up
        (1 + 2.0**-8 + 2.0**-20, 0x3F81),
        (3.4e38, 0x7F80),  # beyond the largest: infinity, as the formats have it
        (-np.inf, 0xFF80),
        (2.0**-133, 0x0001),
        (-0.0, 0x8000),
    ],
)
def test_bfloat16_is_rounded_to_nearest_even(value: float, stored: int) -> None:
    tensor = Tensor.of_array("x", np.array([value], np.float32))
    assert tensor.stored_as(BF16).data.tolist() == [stored]


@pytest.mark.parametrize("payload", [0x7F800001, 0x7FFFFFFF, 0xFF80FFFF])
@pytest.mark.parametrize("format", [F16, BF16], ids=str)
def test_a_nan_stays_one(payload: int, format: Format) -> None:
    tensor = Tensor.of_array("x", np.array([payload], np.uint32).view(np.float32))
    assert np.isnan(tensor.stored_as(format).float32())


def test_a_value_beyond_f16_is_an_error_that_names_the_tensor(tmp_path: Path) -> None:
    original = source()

    def values(name: str, begin: int, end: int) -> Tensor:
        scale = np.float32(1e6 if name == "layers.3.ffn_norm.weight" else 1)
        return Tensor.of_array(name, original.values(name, begin, end).float32() * scale)

    with pytest.raises(Lfm2kitError, match=r"layers\.3\.ffn_norm\.weight.*BF16"):
        write_checkpoint(replace(original, values=values), tmp_path / "narrow", F16)
    assert snapshot(tmp_path) == {}


def test_a_config_says_untied_under_either_key(tmp_path: Path) -> None:
    config = {**FIELDS, "tie_word_embeddings": None, "tie_embedding": False}
    write_checkpoint(random_source(config), tmp_path / "random")
    assert HEAD in open_checkpoint(tmp_path / "random").weights


def test_the_config_written_is_the_one_that_was_read(tmp_path: Path) -> None:
    """Also where data/, which may hold inputs and answers, has a config.json of its own."""
    folder = copied(CASE, tmp_path / "model")
    change_json(folder / "config.json", eos_token_id=7)
    (folder / "data").mkdir()
    (folder / "data" / "config.json").write_text("{}")
    write_checkpoint(source_of(open_checkpoint(folder)), tmp_path / "there")
    assert json.loads((tmp_path / "there" / "config.json").read_text())["eos_token_id"] == 7


def test_the_config_states_the_type_that_was_asked_for(tmp_path: Path) -> None:
    write_checkpoint(source(), tmp_path / "narrow", BF16)
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["dtype"] == "bfloat16"


def test_conversion_holds_less_than_its_largest_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tens of megabytes of weights pass through the memory of a few pieces."""
    monkeypatch.setattr(pieces, "threads", lambda: 2)
    wide = {"hidden_size": 512, "moe_intermediate_size": 512, "num_experts": 5, "vocab_size": 8192}
    original = random_source({**FIELDS, **wide})
    largest = 4 * max(original.size(name) for name in original.shapes)
    tracemalloc.start()
    write_checkpoint(original, tmp_path / "model.bin")
    write_checkpoint(source_of(open_checkpoint(tmp_path / "model.bin")), tmp_path / "to", BF16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert largest == 16 * 2**20
    assert peak < largest


# ---- at random ----


def test_the_number_of_threads_does_not_change_a_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = random_source({**FIELDS, "hidden_size": 512, "vocab_size": 2048}, seed=5)
    for count in (1, 5):
        monkeypatch.setattr(pieces, "threads", lambda count=count: count)
        write_checkpoint(wide, tmp_path / str(count), BF16)
    assert max(map(wide.size, wide.shapes)) > 3 * PIECE
    one, five = (content(read_safetensors(tmp_path / n / SINGLE)) for n in ("1", "5"))
    assert one == five


@given(cuts=st.sets(st.integers(0, 480_000), min_size=2, max_size=2))
@settings(max_examples=20, deadline=None)
def test_a_random_value_depends_on_its_place_alone(cuts: set[int]) -> None:
    begin, end = sorted(cuts)
    wide = random_source({**FIELDS, "vocab_size": 20_000}, seed=5)
    whole = wide.tensor("embed_tokens.weight").data.reshape(-1)
    part = wide.values("embed_tokens.weight", begin, end).data
    np.testing.assert_array_equal(part, whole[begin:end])


def test_pieces_and_seeds_and_names_have_values_of_their_own() -> None:
    wide = {**FIELDS, "vocab_size": 30_000, "tie_word_embeddings": False}
    firsts = [
        random_source(wide, seed).values(name, i * PIECE, i * PIECE + 8).data.tobytes()
        for seed in (0, 1)
        for name in ("embed_tokens.weight", "lm_head.weight")
        for i in range(3)
    ]
    assert len(set(firsts)) == len(firsts)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("embed_tokens.weight", [0.5975768, -0.12800631, -0.17912363]),
        ("embedding_norm.weight", [0.96710247, 1.151558, 0.84943426]),
        ("layers.2.feed_forward.expert_bias", [-0.19355698, -0.01838587, 0.04466557]),
    ],
)
def test_a_seed_gives_the_values_that_it_always_gave(name: str, values: list[float]) -> None:
    """Whoever has recorded results with `--seed` wants to get them again."""
    source = random_source({**FIELDS, "vocab_size": 1024, "hidden_size": 128}, seed=3)
    np.testing.assert_allclose(source.tensor(name).data.reshape(-1)[:3], values, rtol=1e-6)


# ---- what goes along ----


COMPANIONS = [
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "generation_config.json", "additional_chat_templates/tools.jinja",
]  # fmt: skip


def published(folder: Path) -> Path:
    """Return a model with everything that its publisher puts beside the weights."""
    copied(CASE, folder)
    (folder / "additional_chat_templates").mkdir()
    for name in [*COMPANIONS, "README.md", "LICENSE", ".gitattributes"]:
        (folder / name).write_bytes(name.encode() + b"\r\n\xff")
    return folder


def companions_in(folder: Path) -> dict[str, bytes]:
    return {n: (folder / n).read_bytes() for n in COMPANIONS if (folder / n).exists()}


@pytest.mark.parametrize("name", ["there", "there.bin"])
def test_tokenizer_template_and_generation_settings_go_along(
    name: str, tmp_path: Path, cli: Cli
) -> None:
    folder = published(tmp_path / "model")
    (tmp_path / "out").mkdir()
    done = cli("convert", folder, tmp_path / "out" / name)
    there = tmp_path / "out" / (name if name == "there" else "")
    assert companions_in(there) == companions_in(folder)
    assert len(companions_in(there)) == len(COMPANIONS)
    _, said = done.err.splitlines()
    assert said == f"lfm2kit: not copied from {folder}: LICENSE, README.md"
    assert not (there / "README.md").exists()


def test_they_come_back_from_beside_a_model_bin(tmp_path: Path) -> None:
    folder = published(tmp_path / "model")
    write_checkpoint(source_of(open_checkpoint(folder)), tmp_path / "model.bin")
    write_checkpoint(source_of(open_checkpoint(tmp_path / "model.bin")), tmp_path / "back")
    assert companions_in(tmp_path / "back") == companions_in(folder)


def test_a_file_behind_a_link_is_copied_and_not_linked(tmp_path: Path) -> None:
    folder = copied(CASE, tmp_path / "model")
    (tmp_path / "blob").write_bytes(b"{}")
    (folder / "tokenizer.json").symlink_to(tmp_path / "blob")
    write_checkpoint(source_of(open_checkpoint(folder)), tmp_path / "there")
    assert not (tmp_path / "there" / "tokenizer.json").is_symlink()
    assert (tmp_path / "there" / "tokenizer.json").read_bytes() == b"{}"


def test_a_folder_with_its_companions_may_be_rewritten_in_its_own_place(tmp_path: Path) -> None:
    folder = copied(CASE, tmp_path / "model")
    (folder / "tokenizer.json").write_bytes(b"{}")
    write_checkpoint(source_of(open_checkpoint(folder)), folder, BF16, overwrite=True)
    assert (folder / "tokenizer.json").read_bytes() == b"{}"
    assert open_checkpoint(folder).weights["embed_tokens.weight"].format == BF16


def test_another_models_tokenizer_is_not_replaced_unasked(tmp_path: Path) -> None:
    folder, out = published(tmp_path / "model"), tmp_path / "out"
    out.mkdir()
    (out / "tokenizer.json").write_bytes(b"another's")
    (out / "chat_template.jinja").write_bytes((folder / "chat_template.jinja").read_bytes())
    before = snapshot(out)
    with pytest.raises(Lfm2kitError, match=r"tokenizer\.json is another model's"):
        write_checkpoint(source_of(open_checkpoint(folder)), out / "model.bin")
    assert snapshot(out) == before
    write_checkpoint(source_of(open_checkpoint(folder)), out / "model.bin", overwrite=True)
    assert companions_in(out) == companions_in(folder)


def test_a_model_bin_in_the_models_own_folder_leaves_what_is_there(
    tmp_path: Path, cli: Cli
) -> None:
    """Even where it may overwrite: that is not meant for the source."""
    folder = published(tmp_path / "model")
    change_json(folder / "config.json", dtype="bfloat16")
    before = snapshot(folder)
    done = cli("convert", folder, folder / "model.bin", "--overwrite")
    assert (done.code, done.err.count("\n")) == (0, 1), done
    after = snapshot(folder)
    assert after.pop("model.bin")
    assert after == before


# ---- what is replaced, and what is not ----


def test_an_old_folder_keeps_no_file_that_the_new_one_lacks(tmp_path: Path) -> None:
    """Such as the tokenizer of the model that is there, and weights under another name."""
    for name in ("tokenizer.json", "consolidated.safetensors", "inputs.bin"):
        target = copied(CASE, tmp_path / name)
        (target / name).write_bytes(b"precious")
        before = snapshot(target)
        with pytest.raises(Lfm2kitError, match=name):
            write_checkpoint(source("odd_one_kv_head"), target, overwrite=True)
        assert snapshot(target) == before


def test_a_folder_does_not_take_the_place_of_a_model_bin_that_it_holds(tmp_path: Path) -> None:
    write_checkpoint(source(), tmp_path / "model.bin")
    before = snapshot(tmp_path)
    inside = source_of(open_checkpoint(tmp_path / "model.bin"))
    with pytest.raises(Lfm2kitError, match=r"holds 'model\.bin'"):
        write_checkpoint(inside, tmp_path, overwrite=True)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("link", ["symbolic", "hard"])
def test_a_model_bin_does_not_take_the_place_of_a_shard_of_its_source(
    link: str, tmp_path: Path
) -> None:
    folder = copied(CASE, tmp_path / "model")
    (folder / SINGLE).rename(folder / "weights.bin")
    (folder / SINGLE).symlink_to("weights.bin")
    target = tmp_path / "model.bin"
    if link == "hard":
        os.link(folder / "weights.bin", target)
    else:
        target.symlink_to(folder / "weights.bin")
    before = snapshot(tmp_path)
    with pytest.raises(Lfm2kitError, match="the source is read from this file"):
        write_checkpoint(source_of(open_checkpoint(folder)), target, overwrite=True)
    assert snapshot(tmp_path) == before


def test_the_sources_own_config_stays_even_behind_a_link(tmp_path: Path) -> None:
    folder, out = copied(CASE, tmp_path / "model"), tmp_path / "out"
    out.mkdir()
    (out / "config.json").symlink_to(folder / "config.json")
    before = snapshot(folder)
    original = source_of(open_checkpoint(folder))
    for _ in range(2):
        write_checkpoint(original, out / "model.bin", overwrite=True)
    assert snapshot(folder) == before


def test_random_weights_do_not_take_the_place_of_the_config_they_are_made_by(
    tmp_path: Path, cli: Cli
) -> None:
    config = tmp_path / "config.bin"
    config.write_text(json.dumps(FIELDS))
    done = cli("convert", config, config, "--random", "--overwrite")
    done.assert_fails("config.bin", "the source is read from this file")
    assert json.loads(config.read_text()) == FIELDS


def test_a_model_bin_with_hard_links_is_rewritten_in_its_own_place(tmp_path: Path) -> None:
    """All of the new file is there before the first byte of the old one, which is mapped, goes."""
    path, other = tmp_path / "model.bin", tmp_path / "other"
    write_checkpoint(source(), path)
    before = path.read_bytes()
    os.link(path, other)
    notes: list[str] = []
    again = source_of(open_checkpoint(path))
    write_checkpoint(again, path, overwrite=True, note=notes.append)
    assert other.read_bytes() == path.read_bytes() == before
    assert len(notes) == 1


def test_an_old_folder_gives_way_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    write_checkpoint(source(), target, max_shard=20_000)
    write_checkpoint(source("odd_one_kv_head"), target, overwrite=True)
    assert sorted(snapshot(tmp_path)) == ["model", "model/config.json", f"model/{SINGLE}"]
    assert open_checkpoint(target).spec == open_checkpoint(ORACLE / "odd_one_kv_head").spec


def test_a_checkpoint_may_be_rewritten_in_its_own_place(tmp_path: Path) -> None:
    folder, path = copied(CASE, tmp_path / "model"), tmp_path / "model.bin"
    write_checkpoint(source_of(open_checkpoint(folder)), folder, BF16, overwrite=True)
    assert open_checkpoint(folder).weights["embed_tokens.weight"].format == BF16
    write_checkpoint(source(), path)
    before = path.read_bytes()
    write_checkpoint(source_of(open_checkpoint(path)), path, overwrite=True)
    assert path.read_bytes() == before


def test_a_config_beside_the_target_stays_if_it_says_the_same(tmp_path: Path) -> None:
    folder = copied(CASE, tmp_path / "model")
    before = (folder / "config.json").read_bytes() + b"\n\n"
    (folder / "config.json").write_bytes(before)
    write_checkpoint(source_of(open_checkpoint(folder)), folder / "model.bin")
    assert (folder / "config.json").read_bytes() == before


def test_another_models_config_beside_the_target_is_not_replaced_unasked(tmp_path: Path) -> None:
    folder = copied("odd_one_kv_head", tmp_path / "model")
    before = snapshot(folder)
    with pytest.raises(Lfm2kitError, match="another model's"):
        write_checkpoint(source(), folder / "model.bin")
    assert snapshot(folder) == before
    (folder / SINGLE).unlink()
    write_checkpoint(source(), folder / "model.bin", overwrite=True)
    assert open_checkpoint(folder / "model.bin").config == open_checkpoint(ORACLE / CASE).config


@pytest.mark.parametrize("weights", ["model.bin", SINGLE])
@pytest.mark.parametrize("shared", ["config.json", "tokenizer.json"])
def test_what_other_weights_in_the_folder_share_is_not_replaced_even_if_asked(
    weights: str, shared: str, tmp_path: Path, cli: Cli
) -> None:
    """A second model.bin beside a first one would leave that one without its description."""
    there = CASE if shared == "tokenizer.json" else "odd_one_kv_head"
    folder, other = published(tmp_path / "model"), copied(there, tmp_path / "other")
    (other / "tokenizer.json").write_bytes(b"another's")
    if weights == "model.bin":
        write_checkpoint(source_of(open_checkpoint(other)), other / weights)
        (other / SINGLE).unlink()
    before = snapshot(other)
    done = cli("convert", folder, other / "x.bin", "--overwrite")
    done.assert_fails(f"{other / shared} is {weights}'s as well; give another folder")
    assert snapshot(other) == before


def test_weights_of_the_same_model_share_its_config(tmp_path: Path, cli: Cli) -> None:
    """Samples beside them are not weights."""
    write_checkpoint(source(), tmp_path / "model.bin")
    (tmp_path / "inputs.bin").write_bytes(bytes(16))
    before = snapshot(tmp_path)
    write_checkpoint(source(), tmp_path / "x.bin", overwrite=True)
    after = snapshot(tmp_path)
    assert after.pop("x.bin") == before["model.bin"]
    assert after == before
    (tmp_path / "model.bin").unlink()
    write_checkpoint(source("odd_one_kv_head"), tmp_path / "x.bin", overwrite=True)


@pytest.mark.parametrize("text", ['{"my": "web app"}', "{", ""])
def test_a_config_json_that_is_no_models_is_never_replaced(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    before = snapshot(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(Lfm2kitError, match=r"config\.json.*move this file away"):
            write_checkpoint(source(), tmp_path / "model.bin", overwrite=overwrite)
    assert snapshot(tmp_path) == before


def test_a_file_that_is_no_model_bin_is_never_replaced(tmp_path: Path) -> None:
    ids = tmp_path / "ids.bin"
    write_inputs(ids, np.zeros((2, 16), np.int32))
    before = snapshot(tmp_path)
    with pytest.raises(Lfm2kitError, match=r"ids\.bin.*move this file away"):
        write_checkpoint(source(), ids, overwrite=True)
    assert snapshot(tmp_path) == before


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    write_checkpoint(source(), tmp_path / "model")
    (tmp_path / "link").symlink_to("model")
    write_checkpoint(source("odd_one_kv_head"), tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert open_checkpoint(tmp_path / "model").config.num_key_value_heads == 1  # type: ignore[union-attr]


@pytest.fixture
def full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a current folder with much that must stay as it is."""
    monkeypatch.chdir(tmp_path)
    for folder in ("folder", "folder.bin", "keeps/x.safetensors"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("folder/thesis.txt", "keeps/x.safetensors/thesis.txt", "notes", "model.bin"):
        (tmp_path / name).write_text("precious")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["folder"], ["folder", "exists", "--overwrite"]),
        (["notes"], ["notes", "exists", "--overwrite"]),
        (["model.bin"], ["model.bin", "exists", "--overwrite"]),
        (["."], ["exists", "--overwrite"]),
        (["folder", "--overwrite"], ["thesis.txt"]),
        (["notes", "--overwrite"], ["notes", "is a file"]),
        (["folder.bin", "--overwrite"], ["folder.bin", "is a folder"]),
        (["keeps", "--overwrite"], ["keeps", "x.safetensors"]),
        ([".", "--overwrite"], ["holds"]),
        (["..", "--overwrite"], ["holds"]),
        (["/", "--overwrite"], ["holds"]),
        (["nowhere/model.bin"], ["no folder", "nowhere"]),
        (["nowhere/model"], ["no folder", "nowhere"]),
        (["notes/model.bin"], ["no folder", "notes"]),
        (["n" * 300], ["nnn", "name too long"]),
        (["n" * 300 + ".bin"], ["nnn", "name too long"]),
        (["/proc/model.bin"], ["/proc/model.bin"]),
        (["half.bin", "--dtype", "F16"], ["F16", "folder"]),
    ],
)
def test_a_bad_target_is_one_line_and_changes_nothing(
    full: Path, cli: Cli, arguments: list[str], words: list[str]
) -> None:
    before = snapshot(full)
    cli("convert", ORACLE / CASE, *arguments).assert_fails(*words)
    assert snapshot(full) == before


@pytest.mark.parametrize("name", ["tinny", "n" * 5000, "folder", "notes"])
def test_a_bad_source_is_one_line_and_writes_nothing(full: Path, cli: Cli, name: str) -> None:
    before = snapshot(full)
    cli("convert", name, "target").assert_fails(name[:100])
    assert snapshot(full) == before


@pytest.mark.parametrize("arguments", [["--dtype", "F64"], ["--seed", "-1"], ["--nonsense"]])
def test_a_wrong_option_is_exit_code_2(full: Path, cli: Cli, arguments: list[str]) -> None:
    assert cli("convert", ORACLE / CASE, "target", *arguments).code == 2
    assert not (full / "target").exists()


@pytest.mark.parametrize("name", ["model", "model.bin"])
def test_what_comes_to_be_during_a_conversion_is_not_replaced_unasked(
    name: str, tmp_path: Path
) -> None:
    """By a second conversion, say."""
    other = source("odd_one_kv_head")

    def done(nbytes: int) -> None:
        if not (tmp_path / name).exists():
            write_checkpoint(other, tmp_path / name)

    with pytest.raises(Lfm2kitError, match="already exists"):
        write_checkpoint(source(), tmp_path / name, done=done)
    assert open_checkpoint(tmp_path / name).config == parse_config(other.config)


@pytest.mark.parametrize("is_mounted", [True, False])
def test_a_file_that_is_put_into_the_old_folder_meanwhile_is_not_lost(
    is_mounted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    write_checkpoint(source(), target)
    monkeypatch.setattr(folders, "mount_points", lambda: {str(target)} if is_mounted else set())
    other = source("odd_one_kv_head")
    notes: list[str] = []
    write_checkpoint(other, target, overwrite=True, note=notes.append)
    assert len(notes) == is_mounted
    with pytest.raises(Lfm2kitError, match=r"thesis\.txt"):
        write_checkpoint(
            source(), target, overwrite=True, done=lambda _: (target / "thesis.txt").touch()
        )
    assert sorted(snapshot(tmp_path)) == [
        "model", "model/config.json", f"model/{SINGLE}", "model/thesis.txt",
    ]  # fmt: skip
    assert open_checkpoint(target).config == parse_config(other.config)


# ---- what breaks it off ----


def stopping(error: BaseException) -> Callable[[int], None]:
    """Let five tensors pass, then fail."""
    passed: list[int] = []

    def done(nbytes: int) -> None:
        passed.append(nbytes)
        if len(passed) > 5:
            raise error

    return done


@pytest.mark.parametrize("name", ["model", "model.bin"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_what_breaks_off_leaves_the_old_and_nothing_new(
    tmp_path: Path, name: str, error: BaseException
) -> None:
    write_checkpoint(source(), tmp_path / name)
    before = snapshot(tmp_path)
    other = source("odd_one_kv_head")
    with pytest.raises((KeyboardInterrupt, Lfm2kitError)):
        write_checkpoint(other, tmp_path / name, overwrite=True, done=stopping(error))
    assert snapshot(tmp_path) == before


def test_a_full_disk_is_an_error_that_names_the_target(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(Lfm2kitError, match=r"model\.bin: No space left on device"):
        write_checkpoint(source(), tmp_path / "model.bin", done=stopping(full))


def large_folder(folder: Path) -> Path:
    """Return a checkpoint of 1.3 GB whose data is a hole, which takes seconds to convert."""
    layers = {"layer_types": ["conv"] * 100, "num_hidden_layers": 100, "num_experts": 32}
    config = {**FIELDS, **layers, "hidden_size": 256, "moe_intermediate_size": 256}
    shapes = random_source(config).shapes
    head = header_bytes([(f"model.{name}", BF16, shape) for name, shape in shapes.items()])
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with open(folder / SINGLE, "wb") as file:
        file.write(head)
        file.truncate(len(head) + sum(2 * int(np.prod(shape)) for shape in shapes.values()))
    return folder


@pytest.mark.parametrize("name", ["model", "model.bin"])
def test_ctrl_c_in_the_middle_leaves_no_file_behind(tmp_path: Path, name: str) -> None:
    large, out = large_folder(tmp_path / "large"), tmp_path / "out"
    out.mkdir()
    convert = ["convert", str(large), str(out / name), "--dtype", "F32"]
    job = subprocess.Popen(
        [sys.executable, "-m", "lfm2kit", *convert],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_data(out, job)
    job.send_signal(signal.SIGINT)
    stdout, stderr = job.communicate(timeout=60)
    assert (job.returncode, stdout) == (130, "")
    assert "Traceback" not in stderr
    assert list(out.iterdir()) == []


def wait_for_data(folder: Path, job: subprocess.Popen[str]) -> None:
    """Wait until ten megabytes have been written."""
    while sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 1e7:
        assert job.poll() is None, job.stderr and job.stderr.read()
        time.sleep(0.02)
