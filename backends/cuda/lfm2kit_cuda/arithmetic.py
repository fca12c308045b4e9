"""The arithmetic of each precision."""

from __future__ import annotations

from lfm2kit.errors import Lfm2kitError, Option
from lfm2kit_cuda import device
from lfm2kit_cuda.gemm import Gemm
from lfm2kit_cuda.gemm16 import TensorCoreGemm
from lfm2kit_cuda.gemm90 import HopperGemm, ThreeTermGemm
from lfm2kit_cuda.products import Arithmetic

BF16_FROM, HOPPER = (8, 0), (9, 0)


def arithmetic(precision: str) -> Arithmetic:
    """Return what the blocks of a precision multiply with.

    Raise Lfm2kitError if this GPU lacks the instructions for it.
    """
    capability = device.compute_capability()
    is_hopper = capability[0] == HOPPER[0]
    if precision == "fp32":
        return Gemm()
    if precision == "bf16" and capability < BF16_FROM:
        raise _refusal(precision, BF16_FROM, "fp16")
    if precision == "fp32x3" and not is_hopper:
        raise _refusal(precision, HOPPER, "fp32")
    if precision == "fp32x3":
        return ThreeTermGemm()
    return (HopperGemm if is_hopper else TensorCoreGemm)(precision.upper().replace("FP", "F"))


def _refusal(precision: str, needed: tuple[int, int], instead: str) -> Lfm2kitError:
    has, needs = (".".join(map(str, c)) for c in (device.compute_capability(), needed))
    return Lfm2kitError(
        f"precision {precision} needs tensor cores of compute capability {needs}, {device.name()} "
        f"has {has}; try ",
        Option("precision", instead),
    )
