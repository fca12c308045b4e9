"""Announces a reader of GGUF files.  Importing this is free."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import lfm2kit

if TYPE_CHECKING:
    from lfm2kit.checkpoint import Checkpoint

SIGN = b"GGUF"  # the first bytes of every such file


def recognises(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(SIGN)) == SIGN
    except OSError:  # a folder, or a file that may not be read: lfm2kit says so
        return False


def open_file(path: Path) -> Checkpoint:
    from lfm2kit_gguf.reader import open_gguf  # here: the library takes a fifth of a second

    return open_gguf(path)


@lfm2kit.hookimpl
def lfm2kit_checkpoints() -> Iterator[lfm2kit.CheckpointReader]:
    summary = "LFM2 models in llama.cpp's GGUF files"
    yield lfm2kit.CheckpointReader("gguf", summary, recognises, open_file)
