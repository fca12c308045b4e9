"""Facts about the same model and code are the same wherever they lie; others differ by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest

from lfm2kit.building.loading import find_model
from lfm2kit.building.plugins import Plugins, installed_plugins
from lfm2kit.checkpoint import Checkpoint, open_checkpoint
from lfm2kit.checkpoint.safetensors import read_safetensors, write_safetensors
from lfm2kit.formats import BF16, F32
from lfm2kit.ranks import fingerprints
from lfm2kit.ranks.agreement import Fact, Facts, compared
from lfm2kit.weights import Tensor
from tests.conformance.late import LateBackend, LateMemory
from tests.core.small import build, small_spec

NORM = "model.layers.3.operator_norm.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(find_model("tiny"), tmp_path / "tiny")


def said(one: Facts, other: Facts) -> str:
    refusal = compared([one, other])
    return "" if refusal is None else refusal.sentence


def embedded() -> Facts:
    return fingerprints.of_model(open_checkpoint(find_model("tiny")))


def rewritten(folder: Path, change: Callable[[Tensor], Tensor]) -> Checkpoint:
    """Return the model in `folder` with one of its tensors changed."""
    path = folder / "model.safetensors"
    tensors = read_safetensors(path)
    tensors[NORM] = change(tensors[NORM])
    entries = [(name, tensor.format, tensor.shape) for name, tensor in tensors.items()]
    with (folder / "new").open("wb") as file:
        write_safetensors(file, entries, lambda name: tensors[name].data)
    (folder / "new").replace(path)
    return open_checkpoint(folder)


def test_a_copy_of_a_model_is_the_same_model(folder: Path) -> None:
    assert said(embedded(), fingerprints.of_model(open_checkpoint(folder))) == ""


def test_a_setting_of_the_model_is_named(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "norm_eps": 0.5}))
    sentence = said(embedded(), fingerprints.of_model(open_checkpoint(folder)))
    assert "the model's norm_eps is 1e-05" in sentence
    assert f"and 0.5 ({folder}) on rank 1" in sentence


def test_a_single_value_is_noticed_with_its_layer(folder: Path) -> None:
    def nudged(tensor: Tensor) -> Tensor:
        data = tensor.data.copy()
        data[-1] = np.nextafter(data[-1], 9, dtype=data.dtype) if data.dtype == "<f4" else 1
        return replace(tensor, data=data)

    sentence = said(embedded(), fingerprints.of_model(rewritten(folder, nudged)))
    assert sentence.count(" is ") == 1
    assert "the content of layers.3 is" in sentence


def test_another_type_of_a_tensor_is_noticed_in_the_table_and_the_size(folder: Path) -> None:
    there = read_safetensors(folder / "model.safetensors")[NORM].format
    stored = BF16 if there == F32 else F32
    changed = rewritten(folder, lambda tensor: tensor.stored_as(stored))
    sentence = said(embedded(), fingerprints.of_model(changed))
    assert "the tensor table is" in sentence
    assert "the size of model.safetensors is" in sentence


def test_of_a_large_matrix_a_few_rows_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(find_model("tiny"))
    read = []
    monkeypatch.setattr(fingerprints, "WHOLE_MODEL", 0)
    monkeypatch.setattr(
        fingerprints, "digest", lambda parts: read.extend(map(len, parts)) or "digest"
    )
    fingerprints.of_model(checkpoint)
    assert sum(read) < sum(t.nbytes for t in checkpoint.weights.values()) / 4


def plugin_of(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> Plugins:
    folder.mkdir()
    (folder / f"{name}.py").write_text(f"ADDED = {str(folder)!r}\n")
    monkeypatch.syspath_prepend(str(folder))
    return Plugins([EntryPoint("odd", name, "lfm2kit")])


def test_the_code_of_this_installation_agrees_with_itself() -> None:
    facts = fingerprints.of_code(installed_plugins())
    assert said(facts, fingerprints.of_code(installed_plugins())) == ""
    assert {"lfm2kit", "Python", "numpy", "plugin reference"} <= set(facts)


def test_a_plugin_with_other_code_is_named_and_so_is_a_broken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = fingerprints.of_code(plugin_of(tmp_path / "one", monkeypatch, "odd_one"))
    two = fingerprints.of_code(plugin_of(tmp_path / "two", monkeypatch, "odd_two"))
    assert said(one, two).count(" is ") == 1
    assert "plugin odd is unknown, code" in said(one, two)
    broken = fingerprints.of_code(Plugins([EntryPoint("odd", "not_to_be_found", "lfm2kit")]))
    assert "broken (ModuleNotFoundError: No module named 'not_to_be_found')" in said(one, broken)


def test_code_is_the_same_in_another_place_and_another_in_the_same(tmp_path: Path) -> None:
    package = tmp_path / "package"
    (package / "deep").mkdir(parents=True)
    (package / "deep" / "kernel.cu").write_text("one")
    (package / "__pycache__").mkdir()
    before = fingerprints.of_package(package)
    (package / "__pycache__" / "kept.nbi").write_text("compiled")
    assert fingerprints.of_package(shutil.copytree(package, tmp_path / "copy")) == before
    (package / "deep" / "kernel.cu").write_text("two")
    assert fingerprints.of_package(package) != before


def test_variables_of_lfm2kit_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LFM2KIT_PLUGINS", raising=False)
    before = fingerprints.of_environment()
    monkeypatch.setenv("LFM2KIT_TRACEBACK", "1")
    assert fingerprints.of_environment() == before
    monkeypatch.setenv("LFM2KIT_PLUGINS", "reference")
    assert "LFM2KIT_PLUGINS is missing on rank 0 and reference on rank 1" in said(
        before, fingerprints.of_environment()
    )


class OneUnit(LateMemory):
    name = "tests_unit"

    def unit(self) -> str:
        return "the one unit"


def test_a_memory_that_a_rank_uses_alone_is_its_own_fact() -> None:
    exclusive, shared = LateBackend(OneUnit()), LateBackend()
    placed = build(small_spec(), "a,mlp=b", {"a": exclusive, "b": shared}).placed
    facts = fingerprints.of_memories(placed)
    assert facts == {"memory tests_unit": Fact("the one unit", is_own=True)}
    assert "ranks 0, 1 would share the one unit" in said(facts, facts)
