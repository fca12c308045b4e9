"""Where a router in a block may choose either way, so that a difference is not a fault."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lfm2kit import specs
from lfm2kit.precisions import FP32_GRADE
from lfm2kit.specs import Spec
from lfm2kit.testing.near_ties import NEAR_TIE, GapWatch

OF_A_ROUTER = (specs.Scores, specs.Choice, specs.Router)  # float32 in every precision


def allowed_error(spec: Spec, error: float) -> float:
    """Return the largest error of a block, where a grade allows `error`."""
    return FP32_GRADE.block_error if isinstance(spec, OF_A_ROUTER) else error


def is_clear(watch: GapWatch, allowed: float, rows: int) -> npt.NDArray[np.bool_]:
    """Return for each row whether no router in the newest call of a block was near a tie there.

    The rows of a block with routers inside are those of its routers.  NaN is not a near tie.
    """
    margin = NEAR_TIE if allowed <= FP32_GRADE.block_error else allowed
    clear = np.ones(rows, bool)
    for gaps in watch.gaps:
        if len(gaps) == rows:
            clear &= ~(gaps <= margin)
    return clear
