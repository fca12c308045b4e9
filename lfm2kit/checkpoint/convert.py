"""Writes checkpoints: Hugging Face folders and `model.bin`, from one another or at random.

Piece by piece: a file of any size passes through some 100 MB of memory.  What is written appears
under its name only when it is complete.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from lfm2kit.checkpoint import Checkpoint, quantised
from lfm2kit.checkpoint.config import ModelConfig, parse_config, read_config
from lfm2kit.checkpoint.documents import read_json
from lfm2kit.checkpoint.mapped import Files
from lfm2kit.checkpoint.model_bin import write_model_bin
from lfm2kit.checkpoint.names import CONFIG, INDEX, SINGLE
from lfm2kit.checkpoint.pieces import PIECE, in_order
from lfm2kit.checkpoint.place import (
    Origin,
    check_place,
    companions_beside,
    origin_of,
    other_beside,
)
from lfm2kit.checkpoint.safetensors import write_safetensors
from lfm2kit.errors import Lfm2kitError, Option, either
from lfm2kit.formats import BF16, F16, F32, PLAIN, Format
from lfm2kit.outputs.disk import synced
from lfm2kit.outputs.files import Note, replaced
from lfm2kit.outputs.folders import replaced_folder
from lfm2kit.outputs.targets import identity
from lfm2kit.weights import Tensor

TORCH_NAMES: Mapping[Format, str] = {F32: "float32", F16: "float16", BF16: "bfloat16"}
Done = Callable[[int], None]  # is told bytes

MAX_SHARD = 5_000_000_000  # bytes: Hugging Face's own default


@dataclass(frozen=True, slots=True)
class Source:
    """The shapes to write, and a function that makes values when needed, in any thread."""

    config: Mapping[str, Any]  # the keys of config.json
    shapes: Mapping[str, tuple[int, ...]]  # by canonical name
    formats: Mapping[str, Format]
    values: Callable[[str, int, int], Tensor]  # of a tensor, flat: elements [begin, end)
    origin: Origin = field(default_factory=Origin)

    def tensor(self, name: str) -> Tensor:
        """Return the whole of a tensor, in its shape."""
        flat = self.values(name, 0, self.size(name))
        return Tensor.of_array(name, flat.data.reshape(self.shapes[name]), flat.format)

    def size(self, name: str) -> int:
        """Return how many elements a tensor has."""
        return math.prod(self.shapes[name])


def source_of(checkpoint: Checkpoint) -> Source:
    """Return a checkpoint that was opened, as a source."""
    weights = checkpoint.weights

    def values(name: str, begin: int, end: int) -> Tensor:
        stored = weights[name]
        Files(stored.arrays).check_unchanged()
        return stored.flat(begin, end)

    return Source(
        config=_config_fields(checkpoint),
        shapes={name: tensor.shape for name, tensor in weights.items()},
        formats={name: tensor.format for name, tensor in weights.items()},
        values=values,
        origin=origin_of(checkpoint),
    )


def write_checkpoint(
    source: Source,
    target: Path,
    dtype: Format | None = None,
    *,
    overwrite: bool = False,
    max_shard: int = MAX_SHARD,
    note: Note = warnings.warn,
    done: Done = lambda nbytes: None,
) -> None:
    """Write a `model.bin` with its config.json if `target` ends in .bin, else a folder.

    `dtype` None keeps each tensor's format (a model.bin is F32 always); `expert_bias` is never
    narrowed.  Tokenizer, chat template and generation settings go along.  `note` is told where
    files cannot be replaced in one step, and `done` the bytes of each piece written.
    Raise `Lfm2kitError` where the target exists already, or a value does not fit into F16.
    """
    target = Path(os.path.realpath(target))  # "." gets its name, a link stays one
    check_place(target, source.origin, overwrite=overwrite)
    if target.suffix == ".bin":
        _write_bin(source, target, dtype, overwrite, note, done)
    else:
        _write_folder(source, target, dtype, max_shard, overwrite, note, done)


@contextmanager
def _made(
    source: Source, stored: Mapping[str, Format], done: Done
) -> Iterator[Callable[[str], Iterator[npt.NDArray[Any]]]]:
    """Yield a function that gives the pieces of a tensor; call it in the order of `stored`."""

    def make(part: tuple[str, int]) -> npt.NDArray[Any]:
        name, begin = part
        values = source.values(name, begin, min(begin + PIECE, source.size(name)))
        return np.ascontiguousarray(values.stored_as(stored[name]).data)

    def pieces_of(name: str) -> Iterator[npt.NDArray[Any]]:
        for piece in islice(made, len(range(0, source.size(name), PIECE))):
            yield piece
            done(piece.nbytes)

    parts = ((name, i) for name in stored for i in range(0, source.size(name), PIECE))
    with closing(in_order(make, parts)) as made:
        yield pieces_of


def _write_bin(
    source: Source, target: Path, format: Format | None, overwrite: bool, note: Note, done: Done
) -> None:
    if format not in (None, F32):
        raise Lfm2kitError(f"a model.bin holds F32; for {format} give a folder as the target")
    has_config = _has_config(source, target, overwrite)
    beside = list(companions_beside(target, source.origin, overwrite=overwrite))
    stored: Mapping[str, Format] = dict.fromkeys(source.shapes, F32)
    with replaced(target, note) as file, _made(source, stored, done) as pieces_of:
        write_model_bin(file, list(source.shapes.items()), pieces_of)
        check_place(target, source.origin, overwrite=overwrite)  # again: it took a while
        if not has_config:
            _write_json(target.with_name(CONFIG), _stating(source.config, F32), note)
        for path, new in beside:
            new.parent.mkdir(exist_ok=True)
            _copy(path, new, note)


def _has_config(source: Source, target: Path, overwrite: bool) -> bool:
    """Return whether the config beside the target already describes the source, and stays.

    The source's own config is never overwritten, nor that of other weights in the folder, nor a
    file that is not a model's.
    """
    config = target.with_name(CONFIG)
    if not os.path.exists(config):
        return False
    try:
        there = read_config(config)
    except Lfm2kitError as error:
        raise Lfm2kitError(f"{error}; move this file away, or give another folder") from None
    is_own = identity(config) in map(identity, source.origin.files)
    is_same = there == parse_config(source.config)
    if overwrite and not is_own:
        if (other := other_beside(target)) is not None and not is_same:
            raise Lfm2kitError(f"{config} is {other.name}'s as well; give another folder")
        return other is not None
    if not is_same:
        raise Lfm2kitError(
            f"{config} is another model's; give ", Option("overwrite", True), " or another folder"
        )
    return True


def _stating(config: Mapping[str, Any], format: Format | None) -> Mapping[str, Any]:
    """Return the config with the type of the converted weights."""
    if format is None:
        return config
    others = {key: value for key, value in config.items() if key != "torch_dtype"}
    return others | {"dtype": TORCH_NAMES[format]}


def _write_folder(
    source: Source,
    target: Path,
    format: Format | None,
    max_shard: int,
    overwrite: bool,
    note: Note,
    done: Done,
) -> None:
    stored = {n: _stored_format(n, format or source.formats[n]) for n in source.shapes}
    _check_written(stored)
    sizes = {n: stored[n].nbytes(shape) for n, shape in source.shapes.items()}
    shards = list(_shards(sizes, max_shard))
    with replaced_folder(target, note) as folder:
        weight_map: dict[str, str] = {}
        for i, names in enumerate(shards):
            file_name = SINGLE if len(shards) == 1 else _shard_name(i, len(shards))
            with synced(folder / file_name) as file:
                _write_shard(file, source, {name: stored[name] for name in names}, done)
            weight_map |= dict.fromkeys(map(_on_disk, names), file_name)
        if len(shards) > 1:
            total = {"total_size": sum(sizes.values())}
            _write_json(folder / INDEX, {"metadata": total, "weight_map": weight_map}, note)
        _write_json(folder / CONFIG, _stating(source.config, format), note)
        for name, path in source.origin.companions.items():
            (folder / name).parent.mkdir(exist_ok=True)
            _copy(path, folder / name, note)
        check_place(target, source.origin, overwrite=overwrite, staged=folder)


def _write_shard(file: BinaryIO, source: Source, stored: Mapping[str, Format], done: Done) -> None:
    canonical = {_on_disk(name): name for name in stored}
    entries = [(d, stored[name], source.shapes[name]) for d, name in canonical.items()]
    with _made(source, stored, done) as pieces_of:
        write_safetensors(file, entries, lambda d: pieces_of(canonical[d]))


def _stored_format(name: str, format: Format) -> Format:
    """Return a tensor's format; a router's bias in 16 bits would select other experts."""
    return F32 if name.endswith("expert_bias") else format


def _check_written(stored: Mapping[str, Format]) -> None:
    for name, format in stored.items():
        if format not in PLAIN:
            raise Lfm2kitError(
                f"tensor '{name}' is stored as {format}, which lfm2kit does not write; give ",
                *either(Option("dtype", plain) for plain in PLAIN),
            )


def _on_disk(name: str) -> str:
    return name if name.startswith("lm_head.") else f"model.{name}"


def _shard_name(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _shards(sizes: Mapping[str, int], max_shard: int) -> Iterator[list[str]]:
    """Yield the names in order, in groups of at most `max_shard` bytes (or of one tensor)."""
    shard: list[str] = []
    filled = 0
    for name, size in sizes.items():
        if shard and filled + size > max_shard:
            yield shard
            shard, filled = [], 0
        shard.append(name)
        filled += size
    yield shard


def _write_json(path: Path, fields: Mapping[str, Any], note: Note) -> None:
    with replaced(path, note) as file:
        file.write(json.dumps(fields, indent=2).encode() + b"\n")


def _copy(path: Path, new: Path, note: Note) -> None:
    with open(path, "rb") as old, replaced(new, note) as file:
        shutil.copyfileobj(old, file)


def _config_fields(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the checkpoint's own config.json, or the keys of the config that it was taken for.

    What is written is not quantised, whatever a plugin read.
    """
    if checkpoint.config is None:
        raise Lfm2kitError(f"{checkpoint.path}: it has no config.json to convert")
    path = checkpoint.folder / CONFIG
    if path.exists():
        return {k: value for k, value in read_json(path).items() if k not in quantised.KEYS}
    return config_fields(checkpoint.config)


def config_fields(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of a config.json that says what `config` says."""
    fields = dataclasses.asdict(config)
    fields["layer_types"] = list(config.layer_types)
    fields |= {"model_type": "lfm2_moe", "num_hidden_layers": config.num_hidden_layers}
    return {name: value for name, value in fields.items() if value is not None}
