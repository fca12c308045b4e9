"""Int8 matrices packed into panels, so that a product reads them from the first byte to the last.

A block is 64 rows of a matrix, in 16 panels of 4 rows.  A panel has its rows side by side: 64
values of the first, 64 of the second, and so on, then the next 64 of each.  So the tile, which
multiplies the rows of a panel at once, reads one stream of memory instead of four short ones.

Panel p has the rows p, 16 + p, 32 + p and 48 + p of its block, so that what the tiles of a block
leave are 64 sums in the order of the rows.  A gated block has 32 rows of w1, and then 32 of w3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lfm2kit.backend import Tensor
from lfm2kit_int8.formats import I8, Float32, Int8

BLOCK, PANELS, ROWS, LINE = 64, 16, 4, 64  # rows of a block, its panels, their rows, and a line


@dataclass(frozen=True, slots=True)
class Panels:
    """Packed matrices of one shape, zero-padded, and the scales of their blocks' rows."""

    data: Int8  # [groups, blocks, PANELS, lines, ROWS, LINE]
    scales: Float32  # [groups, blocks, BLOCK]
    columns: int  # of a product
    is_gated: bool


def pack(groups: Sequence[Sequence[Tensor]]) -> Panels:
    """Pack the matrices [out, in] of each group: one, or w1 and w3 of a gated product."""
    parts, (out, k) = len(groups[0]), groups[0][0].shape
    blocks, lines = shape_of_panels(out, k, parts)
    data = np.empty((len(groups), blocks, PANELS, lines, ROWS, LINE), np.int8)
    scales = np.empty((len(groups), blocks, BLOCK), np.float32)
    for tensors, panels, beside in zip(groups, data, scales, strict=True):
        arrays = [tensor.stored_as(I8).arrays for tensor in tensors]
        rows = _in_blocks([values for values, _ in arrays], blocks, lines * LINE)
        panels[...] = rows.reshape(blocks, ROWS, PANELS, lines, LINE).transpose(0, 2, 3, 1, 4)
        beside[...] = _in_blocks([scale[:, None] for _, scale in arrays], blocks, 1)[..., 0]
    return Panels(data, scales, out, is_gated=parts == 2)


def shape_of_panels(out: int, k: int, parts: int) -> tuple[int, int]:
    """Return the blocks of a product of `parts` matrices [out, in], and the lines of a row."""
    return -(-out * parts // BLOCK), -(-k // LINE)


def packed_bytes(out: int, k: int, parts: int) -> int:
    """Return the bytes of a group's panels and scales."""
    blocks, lines = shape_of_panels(out, k, parts)
    return blocks * BLOCK * (lines * LINE + 4)


def _in_blocks(matrices: Sequence[npt.NDArray[Any]], blocks: int, columns: int) -> npt.NDArray[Any]:
    """Return matrices in blocks [blocks, BLOCK, columns], of which each has a part of the rows."""
    width = BLOCK // len(matrices)
    rows = np.zeros((len(matrices), blocks * width, columns), matrices[0].dtype)
    for part, matrix in zip(rows, matrices, strict=True):
        part[: matrix.shape[0], : matrix.shape[1]] = matrix
    blocked = rows.reshape(len(matrices), blocks, width, columns).swapaxes(0, 1)
    return blocked.reshape(blocks, BLOCK, columns)
