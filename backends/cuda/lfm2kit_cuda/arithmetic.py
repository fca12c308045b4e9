"""The arithmetic of each precision: how matrices are packed and multiplied."""

from __future__ import annotations

from lfm2kit_cuda.gemm import Gemm


def arithmetic(precision: str) -> Gemm:
    """What the blocks of a precision multiply with."""
    return {"fp32": Gemm}[precision]()
