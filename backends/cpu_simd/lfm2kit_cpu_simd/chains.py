"""The order in which a product adds its terms, the same as in cuda's gemm.cu.

The k of a product are cut into CHAINS ranges of whole steps, of which the last may be cut off.  The
terms of a range make one chain of fused multiply-adds, which begins at +0.  The chains' sums are
added to +0, in their order.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

CHAINS, STEP = 6, 32


@numba.njit(inline="always")
def chain_bounds(k: Any) -> Any:
    """Return where chains begin, and k: int64, increasing.  Ranges without a step are left out."""
    bounds, count = np.zeros(CHAINS + 1, np.int64), 0
    steps = -(-k // STEP)
    for i in range(1, CHAINS + 1):
        end = min(k, STEP * (steps * i // CHAINS))
        if end > bounds[count]:
            count += 1
            bounds[count] = end
    return bounds[: count + 1]
