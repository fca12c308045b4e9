"""How far a block's results are from those of its twin, and where they are farthest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lfm2kit.testing.compare import each

Clear = npt.NDArray[np.bool_]
Errors = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Difference:
    """The largest difference in the results of one call of a block.

    `error` is relative to the largest value of the result; it is infinite for another id of an
    expert, and where just one side is finite.
    """

    block: str  # its name in the model
    kind: str
    backend: str
    call: str  # of a whole forward, a prompt, or a step after it
    error: float
    allowed: float
    result: int = 0  # which of the arrays that the block returns
    row: int = 0
    column: int = 0
    got: float = 0.0
    want: float = 0.0
    rows: int = 0  # that were compared
    near_ties: int = 0  # rows that were not, because a router may choose either way there

    @property
    def is_within(self) -> bool:
        return self.error <= self.allowed

    @property
    def is_undecided(self) -> bool:
        """Return whether no row can be judged, because a router is near a tie in each."""
        return self.rows == 0 and self.near_ties > 0

    def place(self, samples: tuple[int, ...]) -> str:
        """Return where it is, in a forward over samples [n, seq_len]: a token, and a column."""
        n, seq_len = samples
        tokens = {"prompt": seq_len - 1, "step": 1}.get(self.call, seq_len)  # of each sample
        first = seq_len - 1 if self.call == "step" else 0
        if self.rows + self.near_ties == n:  # the last token's row of each sample
            sample, token = self.row, first + tokens - 1
        else:
            sample, token = self.row // tokens, first + self.row % tokens
        array = f" of its result {self.result}" if self.result else ""
        return f"sample {sample}, token {token}, column {self.column}{array}"


def farthest(
    got: Any, want: Any, allowed: float = np.inf, is_clear: Clear | None = None
) -> dict[str, Any]:
    """Return the fields of a `Difference` that say where the results differ most.

    A row that differs by more than is allowed counts as a near tie where `is_clear`, bool [rows],
    is false: a router may have chosen either way there.
    """
    errors = [_errors(*pair) for pair in zip(each(got), each(want), strict=True)]
    worst = np.max([error.max(axis=1, initial=0) for error in errors], axis=0)
    left_out = np.zeros(len(worst), bool) if is_clear is None else (worst > allowed) & ~is_clear
    rows = np.flatnonzero(~left_out)
    arrays = zip(each(got), each(want), errors, strict=True)
    found = [_of_array(i, *of_array, rows) for i, of_array in enumerate(arrays)]
    counts = {"rows": len(rows), "near_ties": int(left_out.sum())}
    return max(found, key=lambda fields: fields["error"]) | counts


def _of_array(i: int, got: Any, want: Any, errors: Errors, rows: Any) -> dict[str, Any]:
    some = errors[rows]
    if some.size == 0:
        return {"error": 0.0, "result": i}
    at = np.unravel_index(int(np.argmax(some)), some.shape)
    row, column = int(rows[at[0]]), int(at[1])
    return {
        "error": float(some[at]),
        "result": i,
        "row": row,
        "column": column,
        "got": float(got[row, column]),
        "want": float(want[row, column]),
    }


def _errors(got: npt.NDArray[Any], want: npt.NDArray[Any]) -> Errors:
    """Return the error of each value, relative to the largest of `want` that is finite."""
    if want.dtype.kind != "f":
        return np.where(got == want, 0.0, np.inf)
    finite = np.isfinite(want)
    largest = max(float(np.max(np.abs(want), where=finite, initial=0)), 1e-30)
    with np.errstate(invalid="ignore", over="ignore"):
        error: Errors = np.abs(got.astype(np.float64) - want) / largest
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    error[~np.isfinite(error)] = np.inf
    error[same] = 0.0
    return error
