"""Rounds the matrices of a model to int8:  python -m lfm2kit_int8 MODEL NEW_FOLDER."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from lfm2kit.checkpoint import Checkpoint, open_checkpoint, write_safetensors
from lfm2kit.errors import Lfm2kitError
from lfm2kit.formats import F32
from lfm2kit.weights import Tensor, Weights
from lfm2kit_int8.formats import I8
from lfm2kit_int8.reader import CONFIG, QUANTISED, SCALE, WEIGHTS

USAGE = "type: python -m lfm2kit_int8 MODEL NEW_FOLDER"


def quantise(model: Path, new: Path) -> None:
    """Write a folder with the matrices of `model` rounded to int8, all but the routers' gates."""
    if not (model / CONFIG).is_file():
        raise Lfm2kitError(f"{model} has no {CONFIG}; MODEL is a folder as Hugging Face has them")
    checkpoint = open_checkpoint(model)
    with _new_folder(new) as folder:
        fields = json.loads((model / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(fields | QUANTISED))
        _copy_companions(checkpoint, folder)
        _write_rounded(checkpoint.weights, folder / WEIGHTS)


@contextmanager
def _new_folder(new: Path) -> Iterator[Path]:
    """Yield a folder that gets its name when all is written, and is removed otherwise."""
    if new.exists() or not new.parent.is_dir():
        raise Lfm2kitError(f"{new} is there, or cannot be made; name a new folder")
    partial = new.with_name(f"{new.name}.partial")
    partial.mkdir()
    try:
        yield partial
        partial.rename(new)
    except BaseException:
        shutil.rmtree(partial)
        raise


def _copy_companions(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy the tokenizer and the like."""
    for path in checkpoint.files():
        if path.name != CONFIG and ".safetensors" not in path.name and path.suffix != ".bin":
            shutil.copy(path, folder)


def _write_rounded(weights: Weights, path: Path) -> None:
    """Write tensors one after the other, so that one of them is in memory at a time."""

    @lru_cache(maxsize=1)
    def rounded(name: str) -> Tensor:
        return weights[name].stored_as(I8)

    def pieces_of(name: str) -> Iterable[Any]:
        matrix = name.removesuffix(SCALE)
        if matrix != name and matrix in weights:
            return [rounded(matrix).beside[0]]
        return [rounded(name).data if _is_rounded(name, weights) else weights[name].data]

    entries = [entry for name in weights for entry in _entries(name, weights)]
    with open(path, "wb") as file:
        write_safetensors(file, entries, pieces_of)


def _entries(name: str, weights: Weights) -> Iterator[tuple[str, Any, tuple[int, ...]]]:
    shape = tuple(weights[name].shape)
    if _is_rounded(name, weights):
        yield name, I8, shape
        yield name + SCALE, F32, shape[:1]
    else:
        yield name, weights[name].format, shape


def _is_rounded(name: str, weights: Weights) -> bool:
    return len(weights[name].shape) == 2 and not name.endswith("gate.weight")


def main() -> None:
    try:
        if len(sys.argv) != 3:
            raise Lfm2kitError(USAGE)
        quantise(*map(Path, sys.argv[1:]))
    except (Lfm2kitError, OSError) as error:
        print(f"lfm2kit_int8: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
