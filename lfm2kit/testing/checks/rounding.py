"""What a precision's rounding of weights may cost."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lfm2kit.testing.cases import REAL_WIDTHS
from lfm2kit.testing.checks.registry import check
from lfm2kit.testing.compare import assert_close, each
from lfm2kit.testing.host_block import host_block
from lfm2kit.testing.near_ties import GapWatch
from lfm2kit.testing.random_inputs import random_inputs
from lfm2kit.testing.trial import Trial
from lfm2kit.testing.verdicts import CheckFailed

ROWS = 17


@check
def rounded_weights(trial: Trial) -> None:
    """A block that rounds its weights stays near the result of the weights as they are stored.

    The other checks judge what the kernels add to that; this one judges the rounding, by the
    normalised mean square error that the precision's grade allows.  Without such a limit, the
    grade's largest error of a block holds here, too.
    """
    limit = trial.precision.grade.block_nmse
    wide = trial.built(REAL_WIDTHS) if limit is not None else []  # rows of more values spread more
    for spec in [*trial.first_of_kinds(), *wide]:
        weights, inputs = trial.random_weights(spec), random_inputs(spec, trial.rng, ROWS)
        watch = GapWatch(trial.reference)
        got = trial.build(spec, weights)(*inputs)
        want = host_block(watch, spec, weights, is_guarded=False)(*inputs)
        clear = watch.clear_rows(max(trial.near_tie, trial.precision.grade.rounding))
        for array, expected in zip(each(got), each(want), strict=True):
            if limit is None:
                assert_close(array, expected, trial.tolerance, str(spec), clear)
            else:
                _assert_near(array[clear], expected[clear], limit, str(spec))


def _assert_near(
    got: npt.NDArray[np.float32], want: npt.NDArray[np.float32], limit: float, what: str
) -> None:
    """Raise `CheckFailed` unless sum((got - want)^2) is within `limit * sum(want^2)`."""
    error = np.sum((got.astype(np.float64) - want) ** 2)
    size = np.sum(want.astype(np.float64) ** 2)
    if not error <= limit * size:  # true for NaN as well
        raise CheckFailed(
            f"{what}: the normalised mean square error is {error / size:.3g}; allowed is {limit:g}"
        )
