"""Folders with more than one set of weights: which is read, and the one line that says so."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lfm2kit.building.loading import load_model
from lfm2kit.checkpoint import open_checkpoint
from lfm2kit.checkpoint.convert import source_of, write_checkpoint
from lfm2kit.checkpoint.names import INDEX, MODEL_BIN, SINGLE
from tests.checkpoint.attempt import content
from tests.checkpoint.folders import ORACLE, change_json, change_tensors, copied
from tests.checkpoint.typed import Cli

WHOLE, SHARDED = "experts_stored_apart", "odd_sharded"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copied(WHOLE, tmp_path / "model")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return copied(SHARDED, tmp_path / "sharded")


def stale_index(folder: Path) -> None:
    """Write an index as it stays behind when save_pretrained later writes a single file."""
    names = open_checkpoint(folder).weights
    shard = "model-00001-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))


def damaged_index(folder: Path) -> None:
    (folder / INDEX).write_text("{")


def whole_shards(folder: Path) -> None:
    """Write a second set that could be read as well, with other values."""
    other = copied(WHOLE, folder.parent / "other")
    change_tensors(other, lambda tensors: tensors.update(other_norm(tensors)))
    write_checkpoint(source_of(open_checkpoint(other)), folder.parent / "cut", max_shard=20_000)
    for path in (folder.parent / "cut").glob("model*"):
        path.rename(folder / path.name)


def other_norm(tensors: object) -> dict[str, object]:
    name = "model.embedding_norm.weight"
    tensor = tensors[name]  # type: ignore[index]
    return {name: replace(tensor, name=name, data=tensor.data * 2)}


def model_bin(folder: Path) -> None:
    write_checkpoint(source_of(open_checkpoint(folder)), folder / MODEL_BIN)


def pickles(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"PK")


SECOND_SETS: dict[Callable[[Path], None], list[str]] = {
    stale_index: [INDEX, "stale", "delete"],
    damaged_index: [INDEX, "stale"],
    whole_shards: [INDEX, "model-00001-of-", "more"],
    model_bin: [MODEL_BIN],
    pickles: ["pytorch_model.bin"],
}


@pytest.mark.parametrize("add", SECOND_SETS, ids=lambda add: add.__name__)
def test_the_whole_file_is_read_as_transformers_does_and_one_line_says_so(
    folder: Path, add: Callable[[Path], None]
) -> None:
    alone = content(open_checkpoint(folder).weights)
    add(folder)
    checkpoint = open_checkpoint(folder)
    assert content(checkpoint.weights) == alone
    (remark,) = checkpoint.remarks
    for word in [str(folder), f"reading {SINGLE}, not ", *SECOND_SETS[add]]:
        assert word in remark


@pytest.mark.parametrize("case", [WHOLE, SHARDED, "experts_stored_packed"])
def test_a_folder_with_one_set_says_nothing(case: str) -> None:
    assert open_checkpoint(ORACLE / case).remarks == ()


def test_an_index_of_the_whole_file_says_nothing(folder: Path) -> None:
    names = open_checkpoint(folder).weights
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, SINGLE)}))
    assert open_checkpoint(folder).remarks == ()


def test_files_that_an_index_does_not_name_are_remarked(sharded: Path) -> None:
    (sharded / "model-00001-of-00002.safetensors").write_bytes(b"left over")
    (remark,) = open_checkpoint(sharded).remarks
    assert "not model-00001-of-00002.safetensors" in remark


def test_an_index_that_states_another_size_is_remarked(sharded: Path) -> None:
    metadata = json.loads((sharded / INDEX).read_text())["metadata"]
    change_json(sharded / INDEX, metadata={**metadata, "total_size": 1})
    (remark,) = open_checkpoint(sharded).remarks
    assert "total_size is 1" in remark


def test_the_commands_and_the_library_pass_remarks_on(folder: Path, cli: Cli) -> None:
    stale_index(folder)
    run = ["run", "--model", folder, "--backend", "reference", "--random-inputs", 4, "-n", 1]
    for command in (run, ["plan", "--model", folder, "--backend", "reference"]):
        typed = cli(*command)
        assert typed.code == 0
        assert "stale" in typed.out + typed.err
    assert "stale" in cli("convert", folder, folder.parent / "to").err
    with pytest.warns(UserWarning, match="stale"):
        load_model(folder, "reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(ORACLE / WHOLE, "reference")
