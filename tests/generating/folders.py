"""Folders with a small model of random weights, a tokenizer and a template."""

from __future__ import annotations

import json
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm2kit import load_model
from lfm2kit.chat.guided import Guide
from lfm2kit.checkpoint.config import model_spec, parse_config
from lfm2kit.engine.masks import Patience
from lfm2kit.model import LFM2
from lfm2kit.weights import Tensor
from tests.chat.folders import GOLDEN, folder_with
from tests.checkpoint.folders import write_tensors
from tests.core.small import FIELDS

TEMPLATE = (GOLDEN / "lfm2.jinja").read_text()
CONFIG = FIELDS | {
    "vocab_size": 423,  # of the tokenizer
    "max_position_embeddings": 256,
    "layer_types": ["conv", "full_attention"],
    "num_hidden_layers": 2,
    "num_dense_layers": 1,
}


@cache
def _tensors() -> dict[str, Tensor]:
    rng = np.random.default_rng(0)
    shapes = model_spec(parse_config(CONFIG), tied=True).parameters()
    return {
        name: Tensor.of_array(name, rng.normal("norm" in name, 0.3, shape).astype(np.float32))
        for name, shape in shapes.items()
    }


def model_folder(folder: Path, template: str | None = TEMPLATE, **generation: Any) -> Path:
    """Return `folder` with a whole model; `generation` is its generation_config.json."""
    folder.mkdir(exist_ok=True)
    folder_with(folder, template)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "generation_config.json").write_text(json.dumps(generation))
    write_tensors(folder / "model.safetensors", {f"model.{k}": t for k, t in _tensors().items()})
    return folder


def loaded(folder: Path) -> LFM2:
    return load_model(folder, backend="reference")


def give_constraints_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let neither a mask nor a constraint that is compiled be late, however busy the machine is."""
    monkeypatch.setattr("lfm2kit.engine.engine.Patience", lambda: Patience(3600, 3600))
    patient = partial(Guide, seconds=3600)
    monkeypatch.setattr("lfm2kit.generating.language.Guide", patient)
