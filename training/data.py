"""The prepared data: token ids of each part, and where windows may begin, in one .npz file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from lfm2kit.errors import Lfm2kitError

FILE = "tokens.npz"
LEARNT = {"speeches": 1.0, "novels": 2.0, "turns": 0.5}  # how often a token of each is sampled
HELD_OUT = ("held_out_speeches", "held_out_novels")


@dataclass(frozen=True, slots=True)
class Part:
    """Texts of one kind, one after the other: ids uint16 [tokens], and where paragraphs begin."""

    ids: npt.NDArray[np.uint16]
    starts: npt.NDArray[np.int32]  # increasing, from 0
    nbytes: int  # of UTF-8, without special tokens


def write_data(folder: Path, parts: Mapping[str, Part]) -> None:
    """Write the parts into the folder's tokens.npz."""
    arrays: dict[str, Any] = {
        f"{name}.{field}": np.asarray(getattr(part, field))
        for name, part in parts.items()
        for field in Part.__slots__
    }
    np.savez_compressed(folder / FILE, **arrays)


def read_data(folder: Path) -> dict[str, Part]:
    """Return the parts in the folder's tokens.npz, by name.

    Raise `Lfm2kitError` if it cannot be read or has other parts.
    """
    try:
        with np.load(folder / FILE, allow_pickle=False) as arrays:
            return {
                name: Part(
                    arrays[f"{name}.ids"], arrays[f"{name}.starts"], int(arrays[f"{name}.nbytes"])
                )
                for name in (*LEARNT, *HELD_OUT)
            }
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise Lfm2kitError(
            f"{folder / FILE}: {error}; make it with `python -m training.prepare`"
        ) from None


class Windows:
    """Draws windows of the parts that are learnt, each from the beginning of a paragraph.

    A position is drawn first, so that each token is equally likely within its part, and then the
    beginning of its paragraph is taken.
    """

    def __init__(self, parts: Mapping[str, Part], length: int, bos: int, seed: int) -> None:
        self.parts = [parts[name] for name in LEARNT]
        self.length = length
        self.bos = bos
        self.rng = np.random.default_rng(seed)
        self.ends = [len(part.ids) - length for part in self.parts]
        if min(self.ends) <= 0:
            raise Lfm2kitError(f"windows of {length} tokens are longer than a part of the data")
        shares = [len(parts[name].ids) * weight for name, weight in LEARNT.items()]
        self.shares = np.array(shares) / sum(shares)

    def draw(self, count: int) -> npt.NDArray[np.int64]:
        """Return `count` windows, int64 [count, length + 1]: the BOS, then `length` tokens."""
        windows = np.full((count, self.length + 1), self.bos, dtype=np.int64)
        for i, kind in enumerate(self.rng.choice(len(self.parts), count, p=self.shares)):
            part = self.parts[kind]
            position = self.rng.integers(self.ends[kind])
            start = part.starts[np.searchsorted(part.starts, position, side="right") - 1]
            windows[i, 1:] = part.ids[start : start + self.length]
        return windows
