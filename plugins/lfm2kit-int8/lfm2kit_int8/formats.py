"""The format I8: a value in each element of the data, and a float32 scale for each row beside."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lfm2kit.formats import Format

Float32 = npt.NDArray[np.float32]
Int8 = npt.NDArray[np.int8]


def widened(data: Int8, scales: Float32) -> Float32:
    """Return the values [..., in] of data [..., in] and their scales [...]."""
    return data * scales[..., None]


def rounded(values: Float32) -> tuple[Int8, Float32]:
    """Return values [..., in] as int8, and the scales [...] to multiply them with."""
    scales = np.max(np.abs(values), axis=-1) / np.float32(127)
    scales = np.where(scales == 0, np.float32(1), scales)
    return np.rint(values / scales[..., None]).astype(np.int8), scales


I8 = Format("I8", 1, np.dtype(np.int8), widened, rounded)
