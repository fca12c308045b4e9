"""A Hugging Face folder: one safetensors file, or an index and its shards; canonical names.

Canonical names are those of published LFM2-MoE checkpoints without the leading `model.`: one
tensor per expert and projection.  transformers 5 packs experts in memory, and some tools write
them so; they become views of the packed tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePath

from lfm2kit.checkpoint.safetensors import read_safetensors
from lfm2kit.errors import Lfm2kitError
from lfm2kit.weights import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
GATE_UP, DOWN = ".experts.gate_up_proj", ".experts.down_proj"


def read_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder by canonical name; `Lfm2kitError` names file and tensor."""
    if (folder / INDEX).exists():
        return canonical(_read_shards(folder))
    if (folder / SINGLE).exists():
        return canonical(read_safetensors(folder / SINGLE))
    raise Lfm2kitError(f"{folder}: there is neither {SINGLE} nor {INDEX}")


def canonical(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under canonical names, packed experts taken apart without a copy."""
    named: dict[str, Tensor] = {}
    for stored, tensor in tensors.items():
        for name, part in _unpacked(stored.removeprefix("model."), tensor):
            if name in named:
                raise Lfm2kitError(f"tensor '{stored}' gives '{name}' a second time")
            named[name] = Tensor(name, tensor.dtype, part.data)
    return named


def _unpacked(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """gate_up_proj [E, 2I, H] is cat(w1, w3) on dim 1; down_proj [E, H, I] is w2."""
    packed = GATE_UP if name.endswith(GATE_UP) else DOWN
    if not name.endswith(packed):
        yield name, tensor
        return
    rows = tensor.shape[1] if len(tensor.shape) == 3 else 1
    if (packed == GATE_UP and rows % 2) or len(tensor.shape) != 3:
        raise Lfm2kitError(f"tensor '{name}' has shape {list(tensor.shape)}: no packed experts")
    prefix = name.removesuffix(packed)
    for e, expert in enumerate(tensor.data):
        halves = {"w1": expert[: rows // 2], "w3": expert[rows // 2 :]}
        for w, data in (halves if packed == GATE_UP else {"w2": expert}).items():
            yield f"{prefix}.experts.{e}.{w}.weight", Tensor("", tensor.dtype, data)


def _read_shards(folder: Path) -> dict[str, Tensor]:
    """Every tensor from the shard that the index names, and none besides."""
    weight_map = _weight_map(folder / INDEX)
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
    if PurePath(shard).name != shard:  # "../other/file": the index must not lead out of the folder
        raise Lfm2kitError(f"{folder / INDEX}: the shard '{shard}' is no plain file name")
    return read_safetensors(folder / shard)


def _weight_map(path: Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        weight_map = index["weight_map"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise Lfm2kitError(
            f"{path}: no readable index with a weight_map: {type(error).__name__}: {error}"
        ) from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise Lfm2kitError(f"{path}: weight_map is empty or no object")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard:
            raise Lfm2kitError(f"{path}: the shard of '{name}' is {shard!r}")
    return weight_map
