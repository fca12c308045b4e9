"""Reads and writes the assignment's sample files, which are little-endian.

inputs.bin              i32 n, i32 seq_len, i32 ids [n, seq_len]
outputs.bin, answers.bin    i32 n, i32 vocab_size, f32 logits [n, vocab_size]
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lfm2kit.checkpoint.file_kinds import check_regular
from lfm2kit.errors import Lfm2kitError
from lfm2kit.outputs.files import Note, replaced

HEADER = np.dtype("<i4")


class BadAnswersError(Lfm2kitError):
    """A bad answers file, for which the validator calls the outputs INVALID."""


def read_inputs(path: Path) -> npt.NDArray[np.int32]:
    """Return token ids, int32 [n, seq_len], memory-mapped.

    Raise `Lfm2kitError` if the file cannot be read, or its size is not what its header says.
    """
    ids: npt.NDArray[np.int32] = _read(path, np.dtype("<i4"), "seq_len", Lfm2kitError)
    return ids


def read_answers(path: Path) -> npt.NDArray[np.float32]:
    """Return logits, float32 [n, vocab_size], memory-mapped.

    Raise `Lfm2kitError` if the file cannot be read, and `BadAnswersError` if its size is not what
    its header says.
    """
    logits: npt.NDArray[np.float32] = _read(path, np.dtype("<f4"), "vocab_size", BadAnswersError)
    return logits


def write_inputs(path: Path, token_ids: npt.NDArray[np.int32]) -> None:
    """Write token ids [n, seq_len]; a reader sees the old file or the whole new one."""
    _write(path, token_ids, np.dtype("<i4"))


def write_outputs(path: Path, logits: npt.NDArray[np.float32], note: Note = warnings.warn) -> None:
    """Write logits [n, vocab_size]; a reader sees the old file or the whole new one.

    `note` is called with a sentence if the file has to be written in place (see
    `lfm2kit.outputs.files.replaced`).
    """
    _write(path, logits, np.dtype("<f4"), note)


def samples_in(path: Path) -> int:
    """Return how many samples' logits a file holds; 0 if it is not there, or another file."""
    try:
        return len(read_answers(path))
    except Lfm2kitError:
        return 0


def take(token_ids: npt.NDArray[np.int32], n: int) -> npt.NDArray[np.int32]:
    """Return the first n samples; raise `Lfm2kitError` if there are fewer."""
    if not 1 <= n <= len(token_ids):
        there = len(token_ids)
        raise Lfm2kitError(
            f"-n {n}: the inputs hold {there} samples; give a number from 1 to {there}"
        )
    return token_ids[:n]


def check_ids(token_ids: npt.NDArray[np.int32], vocab_size: int) -> None:
    """Raise `Lfm2kitError`, which names the first id outside [0, vocab_size), if there is one."""
    bad = np.argwhere((token_ids < 0) | (token_ids >= vocab_size))
    if len(bad):
        sample, position = bad[0]
        raise Lfm2kitError(
            f"sample {sample}, position {position}: token id {token_ids[sample, position]} "
            f"is outside the vocabulary of {vocab_size}"
        )


def _read(path: Path, dtype: np.dtype[Any], width: str, wrong: type[Lfm2kitError]) -> Any:
    """Return the array of a file, whose size must be exactly what its header says."""
    size = check_regular(path)
    if size < 2 * HEADER.itemsize:  # not even opened: a file in /proc may block whoever reads it
        raise wrong(f"{path}: {size} bytes are too few for a header")
    try:
        with open(path, "rb") as file:
            header = file.read(2 * HEADER.itemsize)
    except OSError as error:
        raise Lfm2kitError(f"{path}: {error.strerror}") from None
    rows, columns = (int(value) for value in np.frombuffer(header, HEADER))
    if rows < 1 or columns < 1:
        raise wrong(f"{path}: the header says {rows} samples with {width} {columns}")
    expected = 2 * HEADER.itemsize + rows * columns * dtype.itemsize
    if size != expected:
        raise wrong(
            f"{path}: {size} bytes, but {rows} samples with {width} {columns} take {expected}"
        )
    return np.memmap(path, dtype, "r", offset=2 * HEADER.itemsize, shape=(rows, columns))


def _write(
    path: Path, array: npt.NDArray[Any], dtype: np.dtype[Any], note: Note = warnings.warn
) -> None:
    with replaced(path, note) as file:
        file.write(np.array(array.shape, dtype=HEADER).tobytes())
        file.write(np.ascontiguousarray(array, dtype=dtype).tobytes())
