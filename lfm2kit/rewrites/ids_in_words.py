"""Says which experts are meant, for `lfm2kit plan`."""

from __future__ import annotations

from collections.abc import Sequence


def ranges(ids: Sequence[int]) -> str:
    """Return "0-3, 7" for the ids 0, 1, 2, 3 and 7, in their order."""
    runs: list[list[int]] = []
    for e in ids:
        if runs and e == runs[-1][-1] + 1:
            runs[-1].append(e)
        else:
            runs.append([e])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def experts(ids: Sequence[int]) -> str:
    """Return "experts 0-3, 7", "expert 5", or "no experts"."""
    if not ids:
        return "no experts"
    return f"{'expert' if len(ids) == 1 else 'experts'} {ranges(ids)}"
