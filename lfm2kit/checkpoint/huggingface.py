"""A Hugging Face folder: one safetensors file, or an index and its shards; canonical names.

Canonical names are those of published LFM2-MoE checkpoints without the leading `model.`: one
tensor per expert and projection.  transformers 5 packs experts in memory, and some tools write
them so; they become views of the packed tensors.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePath
from reprlib import repr as brief  # of what a file says, however long it is
from typing import Any

from lfm2kit import bounds
from lfm2kit.checkpoint.documents import read_json
from lfm2kit.checkpoint.names import INDEX, SINGLE
from lfm2kit.checkpoint.safetensors import read_safetensors
from lfm2kit.errors import Lfm2kitError
from lfm2kit.weights import Tensor

GATE_UP, DOWN = ".experts.gate_up_proj", ".experts.down_proj"


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder by canonical name; `Lfm2kitError` names file and tensor.

    Where there is both one whole file and an index, the file is read, as transformers does.
    """
    if os.path.lexists(folder / SINGLE):  # a link to nowhere counts: the reader says so
        return canonical(folder / SINGLE, read_safetensors(folder / SINGLE))
    if os.path.lexists(folder / INDEX):
        return canonical(folder, _read_shards(folder))
    raise Lfm2kitError(f"{folder}: there is neither {SINGLE} nor {INDEX}")


def canonical(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `path`'s tensors under canonical names, packed experts separated without a copy."""
    named: dict[str, Tensor] = {}
    for stored, tensor in tensors.items():
        for name, part in _unpacked(path, stored.removeprefix("model."), tensor):
            if name in named:
                raise Lfm2kitError(f"{path}: tensor '{stored}' gives '{name}' a second time")
            named[name] = replace(part, name=name)
    return named


def _unpacked(path: Path, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield a tensor, or the experts that it packs: gate_up_proj has w1 and w3, down_proj w2."""
    packed = GATE_UP if name.endswith(GATE_UP) else DOWN
    if not name.endswith(packed):
        yield name, tensor
        return
    shape = list(tensor.shape)
    if len(shape) != 3 or 0 in shape or (packed == GATE_UP and shape[1] % 2):
        expected = (
            "[experts, 2 * rows, columns]" if packed == GATE_UP else "[experts, rows, columns]"
        )
        raise Lfm2kitError(f"{path}: tensor '{name}' has shape {shape}; expected {expected}")
    if shape[0] > bounds.EXPERTS:
        raise Lfm2kitError(
            f"{path}: tensor '{name}' has shape {shape}; lfm2kit takes up to "
            f"{bounds.EXPERTS} experts"
        )
    half = shape[1] // 2
    prefix = name.removesuffix(packed)
    halves = {"w1": slice(half), "w3": slice(half, None)}
    for e in range(shape[0]):
        for w, rows in (halves if packed == GATE_UP else {"w2": slice(None)}).items():
            yield f"{prefix}.experts.{e}.{w}.weight", tensor[e, rows]


def _read_shards(folder: Path) -> dict[str, Tensor]:
    """Return every tensor from the shard that the index names, and no others."""
    weight_map = read_index(folder / INDEX)["weight_map"]
    shards = {shard: _read_shard(folder, shard) for shard in sorted(set(weight_map.values()))}
    for shard, tensors in shards.items():
        for name in tensors:
            if weight_map.get(name) != shard:
                raise Lfm2kitError(
                    f"{folder / shard}: tensor '{name}' is not where {INDEX} says: "
                    f"{weight_map.get(name, 'nowhere')}"
                )
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise Lfm2kitError(f"{folder / shard}: has no tensor '{name}', though {INDEX} says so")
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _read_shard(folder: Path, shard: str) -> dict[str, Tensor]:
    """Return the tensors of a shard beside the index, which must not lead out of its folder."""
    if PurePath(shard).name != shard or shard == "..":
        raise Lfm2kitError(f"{folder / INDEX}: the shard '{shard}' is not the plain name of a file")
    return read_safetensors(folder / shard)


def read_index(path: Path) -> dict[str, Any]:
    """Return the fields of an index; `weight_map` has a shard's name for each tensor."""
    fields = read_json(path)
    weight_map = fields.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise Lfm2kitError(f"{path}: weight_map is missing, empty or not an object")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard:
            raise Lfm2kitError(f"{path}: the shard of '{name}' is {brief(shard)}")
    return fields
