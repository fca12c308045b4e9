"""Remarks on a model's folder: weights that are left unread, and an index that is wrong."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from reprlib import repr as brief  # of what a file says, however long it is

from lfm2kit.checkpoint.huggingface import read_index
from lfm2kit.checkpoint.names import INDEX, MODEL_BIN, SINGLE, WEIGHTS
from lfm2kit.errors import Lfm2kitError
from lfm2kit.weights import Tensor

NAMED = 3  # of the files that are not read; the others are counted


def remarks_on(folder: Path, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield remarks on a folder whose weights were read as `tensors`."""
    first = next(name for name in WEIGHTS if os.path.exists(folder / name))
    shards = _shards(folder)
    read = {first, *(shards if first == INDEX else ())}
    others = [
        name for name in sorted(os.listdir(folder)) if _has_weights(name) and name not in read
    ]
    if first == SINGLE and os.path.exists(folder / INDEX) and shards != {SINGLE}:
        others.insert(0, INDEX + _staleness(folder, shards))
    if others:
        more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
        yield f"{folder}: reading {first}, not {', '.join(others[:NAMED])}{more}"
    if first == INDEX:
        yield from _size(folder, tensors)


def _shards(folder: Path) -> set[str]:
    """Return the files that the index names; none if it is missing or cannot be read."""
    if not os.path.exists(folder / INDEX):
        return set()
    try:
        return set(read_index(folder / INDEX)["weight_map"].values())
    except Lfm2kitError:  # of an index that is not needed
        return set()


def _staleness(folder: Path, shards: set[str]) -> str:
    """Say that an index is stale: save_pretrained removes old shards, but not their index."""
    is_here = any("/" not in name and os.path.exists(folder / name) for name in shards)
    return "" if is_here else " (stale: it names no file that is here; delete it)"


def _has_weights(name: str) -> bool:
    is_torch = name.startswith("pytorch_model") and name.endswith((".bin", ".bin.index.json"))
    return is_torch or name == MODEL_BIN or name.endswith((".safetensors", ".gguf"))


def _size(folder: Path, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Compare the bytes that an index states with its tensors; transformers does not."""
    metadata = read_index(folder / INDEX).get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = sum(tensor.nbytes for tensor in tensors.values())
    if stated is not None and stated != total:
        yield f"{folder / INDEX}: total_size is {brief(stated)}, but the tensors have {total} bytes"
