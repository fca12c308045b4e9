"""Checks the rules of a batch, by whose arrays blocks index memory without further checks.

A forward may be as short as one token of a few sequences, so the checks take microseconds: they
are a few whole-array operations.  Negative numbers, read as uint32, are large ones.
"""

from __future__ import annotations

from reprlib import repr as brief  # of what a caller gives, however long it is
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from lfm2kit.batch import Batch

Int32 = npt.NDArray[np.int32]

INT32 = np.dtype(np.int32)
MOST_CONTEXT = 2**24  # tokens of a sequence: float32 represents larger positions inexactly
PADDING = -1  # the position of a row that stands for no token
ARRAYS = ("token_ids", "positions", "cu_seqlens", "pages", "logits_rows")


def check(batch: Batch) -> None:
    """Raise ValueError if a field of this host batch breaks a rule."""
    for name in ARRAYS:
        check_array(name, getattr(batch, name), 2 if name == "pages" else 1)
    check_sequences(batch)
    check_positions(batch)
    check_pages(batch.pages)
    rows = batch.logits_rows
    if len(rows) and rows.view(np.uint32).max() >= batch.tokens:
        raise ValueError(f"logits_rows lie outside the batch's {batch.tokens} rows")


def check_array(name: str, array: Any, ndim: int = 1) -> None:
    is_masked = isinstance(array, np.ma.MaskedArray)  # blocks would read what the mask hides
    if is_masked or not isinstance(array, np.ndarray) or array.dtype != INT32:
        kind = "masked" if is_masked else getattr(array, "dtype", type(array).__name__)
        raise ValueError(f"{name} is not a NumPy array of int32, but {kind}")
    if array.ndim != ndim or not array.flags.c_contiguous:
        kind = "one contiguous row of numbers" if ndim == 1 else "a contiguous table of numbers"
        raise ValueError(f"{name} of shape {array.shape} is not {kind}")


def check_sequences(batch: Batch) -> None:
    """Check that `cu_seqlens` rises from 0 to `tokens`, with one step for each sequence."""
    ends, tokens, sequences = batch.cu_seqlens, batch.tokens, batch.sequences
    if len(ends) != sequences + 1:
        raise ValueError(f"cu_seqlens has {len(ends)} entries for {sequences} sequences")
    if ends[0] != 0 or ends[-1] != tokens or not (ends[1:] > ends[:-1]).all():
        raise ValueError(
            f"cu_seqlens does not rise from 0 to the {tokens} tokens there are, "
            "by at least one for each sequence"
        )
    longest = int((ends[1:] - ends[:-1]).max()) if sequences else 0
    _check_largest("max_seqlen", batch.max_seqlen, longest)


def check_positions(batch: Batch) -> None:
    """Check that `positions` rise by one within a sequence, from 0 to MOST_CONTEXT - 1.

    Those of padding rows, which come last, are -1.
    """
    positions = batch.positions
    if len(positions) != batch.tokens:
        raise ValueError(f"there are {len(positions)} positions for {batch.tokens} tokens")
    if are_outside(positions):
        padding = int(np.count_nonzero(positions == PADDING))
        if are_outside(positions[: batch.tokens - padding]):
            raise ValueError(f"a position is negative, or beyond {MOST_CONTEXT - 1}")
        check_padding(batch, padding)
    if batch.tokens > batch.sequences:
        steps = positions[1:] - positions[:-1]
        steps[batch.cu_seqlens[1:-1] - 1] = 1  # between two sequences any step is right
        if not (steps == 1).all():
            raise ValueError("positions within a sequence are not consecutive")


def are_outside(positions: Int32) -> bool:
    return len(positions) > 0 and bool(positions.view(np.uint32).max() >= MOST_CONTEXT)


def check_padding(batch: Batch, count: int) -> None:
    """Check that each of the last `count` rows is a sequence of its own, without pages."""
    first = batch.tokens - count
    is_alone = count <= batch.sequences and batch.cu_seqlens[-count - 1] == first
    if not is_alone or (batch.pages[-count:] != -1).any():
        raise ValueError(
            "a padding row, at position -1, is not a sequence of its own without pages"
        )


def check_pages(pages: Int32) -> None:
    """Check that each row of the table is page numbers, then -1."""
    if not pages.size:
        return
    if pages.min() < -1:
        raise ValueError(f"a page number is negative: {pages.min()}; -1 means no page")
    is_page = pages >= 0
    if (is_page[:, 1:] > is_page[:, :-1]).any():
        raise ValueError("a row of pages has another page after a -1")


def integers(name: str, values: npt.ArrayLike) -> Int32:
    """Return `values` as int32; ValueError if they are not integers, or do not fit."""
    if isinstance(values, np.ma.MaskedArray):
        raise ValueError(f"{name} are a masked array; give an array without masked values")
    try:
        array = np.asarray(values)
    except (TypeError, ValueError):  # rows of different lengths, or what looks like an array
        raise ValueError(f"{name} are not a row of integers: {brief(values)}") from None
    if array.dtype == INT32:
        return array
    if array.size and array.dtype.kind not in "iu":
        raise ValueError(f"{name} are not integers, but {array.dtype}")
    if array.size and not -(2**31) <= array.min() <= array.max() < 2**31:
        raise ValueError(
            f"{name} reach from {array.min()} to {array.max()}, which does not fit into int32"
        )
    return array.astype(INT32)


def _check_largest(name: str, stated: Any, is_so: int) -> None:
    if type(stated) is not int or stated != is_so:  # to a kernel a NumPy integer is not an int
        raise ValueError(f"{name} is {stated!r}, but must be the int {is_so}")
