"""What a plugin announces that reads checkpoints in another format than lfm2kit's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lfm2kit.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class CheckpointReader:
    """A reader as a plugin announces it.  Making one must be free: `open` does heavy imports.

    `recognises(path)` is asked of every model that is opened, before lfm2kit looks at it; the path
    is a folder or a regular file.  Look at names and the first bytes alone.  A path that two
    readers take, or that lfm2kit reads without them, is an error.

    `open(path)` returns the checkpoint: specs, tensors by canonical name, remarks.  It reads
    headers; the tensors are views of memory maps (`lfm2kit.checkpoint.map_file`).  lfm2kit then
    checks that their names and shapes are those of the specs.  Raise `Lfm2kitError` for what the
    user must change.
    """

    name: str
    summary: str  # one line for `lfm2kit plugins`
    recognises: Callable[[Path], bool]
    open: Callable[[Path], Checkpoint]
