"""The arithmetic of each precision."""

from __future__ import annotations

from lfm2kit.errors import Lfm2kitError
from lfm2kit_cuda import device
from lfm2kit_cuda.gemm import Gemm
from lfm2kit_cuda.gemm16 import TensorCoreGemm
from lfm2kit_cuda.gemm90 import HopperGemm
from lfm2kit_cuda.products import Arithmetic

PRECISIONS = ("fp32", "bf16", "fp16")
BF16_FROM, HOPPER = (8, 0), 9


def arithmetic(precision: str) -> Arithmetic:
    """What the blocks of a precision multiply with; `Lfm2kitError` if this GPU cannot."""
    if precision == "bf16" and device.compute_capability() < BF16_FROM:
        major, minor = device.compute_capability()
        raise Lfm2kitError(
            f"precision bf16 needs tensor cores of compute capability 8.0, {device.name()} has "
            f"{major}.{minor}; try --precision fp16"
        )
    if precision == "fp32":
        return Gemm()
    tensor_cores = HopperGemm if device.compute_capability()[0] == HOPPER else TensorCoreGemm
    return tensor_cores(precision.upper().replace("FP", "F"))
