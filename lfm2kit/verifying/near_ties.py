"""Which rows of a block cannot be compared, because a router in it may choose either way."""

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


def clear_rows(watch: GapWatch, spec: Spec, allowed: float, rows: int) -> npt.NDArray[np.intp]:
    """Return the rows that no router in the newest call of a block took near a tie.

    The rows of a block with routers inside are those of its routers.
    """
    margin = NEAR_TIE if allowed <= FP32_GRADE.block_error else allowed
    gaps = [one for one in watch.gaps if len(one) == rows]
    if not gaps:
        return np.arange(rows)
    return np.flatnonzero(np.min(gaps, axis=0) > margin)
