"""Reads checkpoints whose matrices are int8 with a float32 scale for each row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lfm2kit.errors import Lfm2kitError

if TYPE_CHECKING:
    from lfm2kit.checkpoint import Checkpoint
    from lfm2kit.weights import Tensor

QUANTISED = {"quantization_config": {"quant_method": "int8-by-rows"}}  # in config.json
CONFIG, WEIGHTS = "config.json", "model.safetensors"
SCALE = "_scale"  # what is appended to a matrix's name for its scales


def recognises(path: Path) -> bool:
    if not (path / CONFIG).is_file():
        return False
    return '"int8-by-rows"' in (path / CONFIG).read_text(errors="replace")


def open_folder(folder: Path) -> Checkpoint:
    """Open a folder; its tensors stay views of the file."""
    from lfm2kit.checkpoint import Checkpoint, canonical, read_safetensors
    from lfm2kit.checkpoint.config import model_spec, parse_config
    from lfm2kit.weights import Weights
    from lfm2kit_int8.formats import I8

    fields = json.loads((folder / CONFIG).read_text())
    config = parse_config({k: v for k, v in fields.items() if k not in QUANTISED})
    stored = read_safetensors(folder / WEIGHTS, {"I8": I8})
    tensors = canonical(folder, dict(_with_scales(stored)))
    spec = model_spec(config, tied="lm_head.weight" not in tensors)
    return Checkpoint(folder, spec, Weights(tensors), config)


def _with_scales(stored: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors; the scales, which the file has as tensors, are beside their matrices."""
    scales = {name: name + SCALE for name, tensor in stored.items() if tensor.format.name == "I8"}
    for name, scale in scales.items():
        if scale not in stored:
            raise Lfm2kitError(f"tensor '{name}' is int8, but there is no '{scale}'")
    for name, tensor in stored.items():
        if name in scales:
            yield name, replace(tensor, beside=(stored[scales[name]].data,))
        elif name not in scales.values():
            yield name, tensor
