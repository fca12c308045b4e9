"""Says in a model's card that it is the best of several that were trained.

    python -m training.choose training/.model training/.other training/.another

The first folder is the model that is kept; all of them have a `training.json`.  The figure
of the best of several is slightly too good, because the held-out text has chosen it; so its card
lists all of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lfm2kit.errors import Lfm2kitError
from training import card
from training.commands import ended


def note_candidates(best: Path, others: Sequence[Path]) -> None:
    """List all candidates, the best first, in the record and the card of the best one.

    Raise `Lfm2kitError` if another one is better, or if a record is broken.
    """
    candidates = [card.candidate(card.read(folder)) for folder in (best, *others)]
    first, *rest = candidates
    for folder, other in zip(others, rest, strict=True):
        if other["bits_per_byte"] < first["bits_per_byte"]:
            raise Lfm2kitError(f"{folder} is better than {best}; name the best folder first")
    card.add(best, candidates=[first, *sorted(rest, key=lambda one: one["bits_per_byte"])])


def main() -> None:
    parser = argparse.ArgumentParser(description="Say that a model is the best of several.")
    parser.add_argument("best", type=Path, help="folder of the model that is kept")
    parser.add_argument("others", type=Path, nargs="+", help="folders of the other candidates")
    options = parser.parse_args()
    note_candidates(options.best, options.others)


if __name__ == "__main__":
    with ended():
        main()
