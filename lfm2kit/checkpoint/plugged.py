"""Which of the readers that plugins bring takes a path."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from lfm2kit.errors import LEAVE_OUT, Lfm2kitError

if TYPE_CHECKING:
    from lfm2kit.building.plugins import InstalledReader


def reader_of(path: Path, readers: Iterable[InstalledReader]) -> InstalledReader | None:
    """Returns the reader that takes `path`; None if there is none, or nothing that can be read.

    Raises `Lfm2kitError` if there are two, and for a reader that raises something else.
    """
    if not (os.path.isfile(path) or os.path.isdir(path)):
        return None
    taking = [reader for reader in readers if reader.recognises(path)]
    if len(taking) > 1:
        both = " and ".join(map(str, taking))
        raise Lfm2kitError(f"{path}: {both} both take it; {LEAVE_OUT}")
    return taking[0] if taking else None
