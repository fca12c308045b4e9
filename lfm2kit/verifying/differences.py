"""How far a block's results are from those of its twin, and where they are farthest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lfm2kit.testing.compare import each

Rows = slice | npt.NDArray[np.intp]


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

    def place(self, samples: tuple[int, ...]) -> str:
        """Return where it is, in a forward over samples [n, seq_len]: a token, and a column."""
        n, seq_len = samples
        count = self.rows + self.near_ties
        length = count // n  # 1 in a step, and of the rows whose logits are wanted
        token = self.row % length if length > 1 else seq_len - 1
        array = f" of its result {self.result}" if self.result else ""
        return f"sample {self.row // length}, token {token}, column {self.column}{array}"


def farthest(got: Any, want: Any, rows: Rows) -> dict[str, Any]:
    """Return the fields of a `Difference` that say where the results differ most."""
    found = [_of_array(i, *pair, rows) for i, pair in enumerate(zip(each(got), each(want)))]  # noqa: B905
    return max(found, key=lambda fields: fields["error"])


def _of_array(i: int, got: npt.NDArray[Any], want: npt.NDArray[Any], rows: Rows) -> dict[str, Any]:
    numbers = np.arange(len(want))[rows]
    error = _errors(got[rows], want[rows])
    if error.size == 0:
        return {"error": 0.0, "result": i}
    at = np.unravel_index(int(np.argmax(error)), error.shape)
    row, column = int(numbers[at[0]]), int(at[1])
    return {
        "error": float(error[at]),
        "result": i,
        "row": row,
        "column": column,
        "got": float(got[row, column]),
        "want": float(want[row, column]),
    }


def _errors(got: npt.NDArray[Any], want: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return the error of each value, relative to the largest of `want` that is finite."""
    if want.dtype.kind != "f":
        return np.where(got == want, 0.0, np.inf)
    finite = np.isfinite(want)
    largest = max(float(np.max(np.abs(want), where=finite, initial=0)), 1e-30)
    with np.errstate(invalid="ignore", over="ignore"):
        error: npt.NDArray[np.float64] = np.abs(got.astype(np.float64) - want) / largest
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    error[~np.isfinite(error)] = np.inf
    error[same] = 0.0
    return error
