"""Reads checkpoints whose matrices are int8 with a float32 scale for each row, and makes them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lfm2kit

if TYPE_CHECKING:
    from lfm2kit.checkpoint import Checkpoint
    from lfm2kit.weights import Tensor

QUANTISED = {"quantization_config": {"quant_method": "int8-by-rows"}}  # in config.json
CONFIG, WEIGHTS = "config.json", "model.safetensors"


@lfm2kit.hookimpl
def lfm2kit_checkpoints() -> Iterator[lfm2kit.CheckpointReader]:
    summary = "matrices in int8, with a scale for each row"
    yield lfm2kit.CheckpointReader("int8", summary, recognises, open_folder)


def recognises(path: Path) -> bool:
    if not (path / CONFIG).is_file():
        return False
    return '"int8-by-rows"' in (path / CONFIG).read_text(errors="replace")


def open_folder(folder: Path) -> Checkpoint:
    """Open a folder; its tensors stay views of the file."""
    from lfm2kit.checkpoint import Checkpoint, canonical, read_safetensors
    from lfm2kit.checkpoint.config import model_spec, parse_config
    from lfm2kit.weights import Weights

    fields = json.loads((folder / CONFIG).read_text())
    config = parse_config({k: v for k, v in fields.items() if k not in QUANTISED})
    stored = read_safetensors(folder / WEIGHTS, {"I8": format_of_rows()})
    tensors = canonical(folder, dict(_with_scales(stored)))
    spec = model_spec(config, tied="lm_head.weight" not in tensors)
    return Checkpoint(folder, spec, Weights(tensors), config)


def _with_scales(stored: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors; the scales, which the file has as tensors, are beside their matrices."""
    scales = {
        name: f"{name}_scale" for name, tensor in stored.items() if tensor.format.name == "I8"
    }
    for name, scale in scales.items():
        if scale not in stored:
            raise lfm2kit.Lfm2kitError(f"tensor '{name}' is int8, but there is no '{scale}'")
    for name, tensor in stored.items():
        if name in scales:
            yield name, replace(tensor, beside=(stored[scales[name]].data,))
        elif name not in scales.values():
            yield name, tensor


def format_of_rows() -> Any:
    """Return the format: a value in each element of the data, and a scale for each row beside."""
    import numpy as np

    from lfm2kit.formats import Format

    return Format("I8", 1, np.dtype(np.int8), lambda data, scales: data * scales[..., None])


def quantise(model: Path, new: Path) -> None:
    """Write a folder with the matrices of `model` rounded to int8, all but the routers' gates."""
    from lfm2kit.checkpoint import open_checkpoint, write_safetensors
    from lfm2kit.formats import F32

    tensors = []
    for name, tensor in open_checkpoint(model).weights.items():
        if len(tensor.shape) != 2 or name.endswith("gate.weight"):
            tensors.append((name, tensor.format, tensor.data))
        else:
            data, scales = rounded(tensor.float32())
            tensors += [(name, format_of_rows(), data), (f"{name}_scale", F32, scales)]
    new.mkdir()
    data_of = {name: data for name, _, data in tensors}
    with open(new / WEIGHTS, "wb") as file:
        entries = [(name, format, data.shape) for name, format, data in tensors]
        write_safetensors(file, entries, lambda name: [data_of[name]])
    fields = json.loads((model / CONFIG).read_text())
    (new / CONFIG).write_text(json.dumps(fields | QUANTISED))


def rounded(values: Any) -> tuple[Any, Any]:
    """Return values [out, in] as int8, and the scales [out] to multiply them with."""
    import numpy as np

    scales = np.max(np.abs(values), axis=1) / np.float32(127)
    scales = np.where(scales == 0, np.float32(1), scales)
    return np.rint(values / scales[:, None]).astype(np.int8), scales


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("type: python -m lfm2kit_int8 MODEL NEW_FOLDER")
    quantise(*map(Path, sys.argv[1:3]))
