"""Copies of small Hugging Face folders, and changes to what they hold."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lfm2kit.checkpoint.names import SINGLE
from lfm2kit.checkpoint.safetensors import read_safetensors, write_safetensors
from lfm2kit.weights import Tensor

ORACLE = Path(__file__).parents[1] / "oracle"

Tensors = dict[str, Tensor]
Change = Callable[[Tensors], None]


def copied(case: str, folder: Path) -> Path:
    """Return a copy of one of tests/oracle's checkpoints."""
    shutil.copytree(ORACLE / case, folder, ignore=shutil.ignore_patterns("*.npz"))
    return folder


def change_tensors(folder: Path, change: Change, file_name: str = SINGLE) -> None:
    """Write a safetensors file anew, its tensors changed."""
    path = folder / file_name
    tensors = read_safetensors(path)
    change(tensors)
    write_tensors(path.with_name("changed"), tensors)
    path.with_name("changed").replace(path)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    entries = [(name, t.format, t.shape) for name, t in tensors.items()]
    with open(path, "wb") as file:
        write_safetensors(file, entries, lambda name: [tensors[name].data])


def change_json(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; None removes one."""
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))


def ones(*shape: int) -> Tensor:
    return Tensor.of_array("", np.ones(shape, np.float32))
