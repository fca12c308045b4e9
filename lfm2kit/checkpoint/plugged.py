"""Which of the readers that plugins bring takes a path, and whether it keeps to its contract."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from reprlib import repr as brief  # of what a plugin returned, however long it is
from typing import TYPE_CHECKING, Any

from lfm2kit.checkpoint.config import ModelConfig
from lfm2kit.errors import LEAVE_OUT, Lfm2kitError
from lfm2kit.formats import PLAIN
from lfm2kit.specs import Model
from lfm2kit.weights import Tensor, Weights

if TYPE_CHECKING:
    from lfm2kit.building.plugins import InstalledReader
    from lfm2kit.checkpoint import Checkpoint


def reader_of(path: Path, readers: Iterable[InstalledReader]) -> InstalledReader | None:
    """Return the reader that takes `path`; None if there is none, or nothing that can be read.

    Raise `Lfm2kitError` if there are two, and for a reader that raises something else.
    """
    if not (os.path.isfile(path) or os.path.isdir(path)):
        return None
    taking = [reader for reader in readers if reader.recognises(path)]
    if len(taking) > 1:
        both = " and ".join(map(str, taking))
        raise Lfm2kitError(f"{path}: {both} both take it; {LEAVE_OUT}")
    return taking[0] if taking else None


def check_opened(who: str, checkpoint: Checkpoint) -> None:
    """Raise `Lfm2kitError`, beginning with `who`, if a field or a tensor is not what it must be.

    A row of each format is unpacked, so that a wrong format is found before anything is built.
    """
    for field, fits in FIELDS.items():
        value = getattr(checkpoint, field)
        if not fits(value):
            raise Lfm2kitError(f"{who} returned a Checkpoint whose {field} is {brief(value)}")
    firsts: dict[str, Tensor] = {}  # the first tensor of each format
    for name, tensor in checkpoint.weights.items():
        if not isinstance(tensor, Tensor):
            raise Lfm2kitError(f"{who}: tensor '{name}' is {brief(tensor)}, not a Tensor")
        firsts.setdefault(tensor.format.name, tensor)
        if tensor.format not in PLAIN and tensor.format.name in map(str, PLAIN):
            raise Lfm2kitError(
                f"{who}: tensor '{name}' is in a format of its own that is called {tensor.format}, "
                "as one of lfm2kit's; give it another name"
            )
    for tensor in firsts.values():
        _check_unpacked(who, tensor)


def _check_unpacked(who: str, tensor: Tensor) -> None:
    one_row = (slice(1),) * (len(tensor.shape) - 1)
    try:
        tensor[one_row].float32()
    except Lfm2kitError as error:
        raise Lfm2kitError(f"{who}: ", *error.args) from error


FIELDS: dict[str, Callable[[Any], bool]] = {
    "path": lambda value: isinstance(value, Path),
    "spec": lambda value: isinstance(value, Model),
    "weights": lambda value: isinstance(value, Weights),
    "config": lambda value: value is None or isinstance(value, ModelConfig),
    "remarks": lambda value: isinstance(value, tuple) and all(isinstance(v, str) for v in value),
    "seed": lambda value: value is None or isinstance(value, int),
}
