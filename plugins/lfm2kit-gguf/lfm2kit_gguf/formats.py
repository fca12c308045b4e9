"""The formats of GGUF tensors: lfm2kit's own, and quantised ones, which the library unpacks."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from lfm2kit.errors import Lfm2kitError
from lfm2kit.formats import BF16, F16, F32, Blocks, Float32, Format

PLAIN = {
    GGMLQuantizationType.F32: F32,
    GGMLQuantizationType.F16: F16,
    GGMLQuantizationType.BF16: BF16,
}


@cache
def format_of(kind: GGMLQuantizationType) -> Format:
    """Return the format of a type of tensors.

    An element of a quantised one is the bytes of a block: lfm2kit need not know what is in them.
    Raise `Lfm2kitError` for a type that the library cannot unpack.
    """
    if kind in PLAIN:
        return PLAIN[kind]
    block_values, block_bytes = GGML_QUANT_SIZES[kind]

    def unpacked(data: Blocks) -> Float32:
        values: Float32 = _unpacked(np.ascontiguousarray(data).view(np.uint8), kind)
        return values

    made = Format(kind.name, block_values, np.dtype((np.void, block_bytes)), unpacked)
    try:
        made.unpack(np.zeros(1, made.block))
    except NotImplementedError:
        raise Lfm2kitError(f"type {kind.name}, which the library gguf cannot unpack") from None
    return made


def _unpacked(data: npt.NDArray[np.uint8], kind: GGMLQuantizationType) -> Float32:
    with np.errstate(all="ignore"):  # a scale may be infinite, and what is not finite is passed on
        values: Float32 = dequantize(data, kind)
    return values
