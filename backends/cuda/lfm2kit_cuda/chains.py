"""The order in which the product of gemm.cu adds its terms; cpu_simd's has the same."""

from __future__ import annotations

from lfm2kit_cuda.constants import GEMM


def chain_bounds(k: int) -> list[int]:
    """Return where the chain of each group of warps begins in k terms, and k at the end.

    The terms of a chain are added in order by fused multiply-adds, the first of them to +0.  A
    chain may have no terms.
    """
    steps = -(-k // GEMM.STEP)
    return [min(k, GEMM.STEP * (steps * i // GEMM.GROUPS)) for i in range(GEMM.GROUPS + 1)]
