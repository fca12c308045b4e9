"""Rounds the matrices of a model to int8:  python -m lfm2kit_int8 MODEL NEW_FOLDER."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lfm2kit.checkpoint import open_checkpoint, write_safetensors
from lfm2kit.formats import F32
from lfm2kit_int8.formats import I8
from lfm2kit_int8.reader import CONFIG, QUANTISED, WEIGHTS


def quantise(model: Path, new: Path) -> None:
    """Write a folder with the matrices of `model` rounded to int8, all but the routers' gates."""
    tensors = []
    for name, tensor in open_checkpoint(model).weights.items():
        if len(tensor.shape) != 2 or name.endswith("gate.weight"):
            tensors.append((name, tensor.format, tensor.data))
        else:
            data, scales = tensor.stored_as(I8).arrays
            tensors += [(name, I8, data), (f"{name}_scale", F32, scales)]
    new.mkdir()
    data_of = {name: data for name, _, data in tensors}
    with open(new / WEIGHTS, "wb") as file:
        entries = [(name, format, data.shape) for name, format, data in tensors]
        write_safetensors(file, entries, lambda name: [data_of[name]])
    fields = json.loads((model / CONFIG).read_text())
    (new / CONFIG).write_text(json.dumps(fields | QUANTISED))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("type: python -m lfm2kit_int8 MODEL NEW_FOLDER")
    quantise(*map(Path, sys.argv[1:3]))
