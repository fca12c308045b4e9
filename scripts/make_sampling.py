"""Makes tests/engine/transformers.npz: rows of logits, and what transformers may draw of them.

    PYTHONPATH=. oracle/bin/python scripts/make_sampling.py        (see make_chats.py)

The arrays of all cases lie one after the other: `logits`, which of them are `kept`, and their
`probabilities`, with the `sizes` of cases; the `ids` before the token, with their `counts`.
`settings` are [cases, 5], in the order of `SETTINGS`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from transformers_sampling import SETTINGS, Case, Floats, Processors, probabilities

TARGET = Path(__file__).parents[1] / "tests" / "engine" / "transformers.npz"
CASES, SIZES = 240, (1, 2, 3, 10, 17, 64, 200)
LEAST_GAP = 1e-5  # to the border of a set: below it, a near tie says nothing
CHOICES: dict[str, tuple[float, ...]] = {
    "temperature": (0.3, 0.6, 1.0, 1.7),
    "top_k": (0, 0, 1, 2, 5, 50, 1000),
    "top_p": (1.0, 1.0, 0.5, 0.9, 0.95, 1e-6),
    "min_p": (0.0, 0.0, 0.05, 0.15, 1.0),
    "repetition_penalty": (1.0, 1.05, 1.3, 0.8),
}


def rows(random: np.random.Generator, size: int) -> dict[str, Floats]:
    """Return logits of several kinds by their names."""
    normal = (3 * random.normal(size=size)).astype(np.float32)
    alone = np.full(size, -np.inf, np.float32)
    alone[random.integers(size)] = normal[0]
    some = np.where(random.random(size) < 0.5, normal, -np.inf).astype(np.float32)
    some[random.integers(size)] = 1
    return {
        "any": normal,
        "large": 100 * normal,
        "equal": np.full(size, normal[0]),
        "alone": alone,
        "some": some,
        "ties": random.integers(-2, 3, size=size).astype(np.float32),
    }


def is_clear(processors: Processors, case: Case) -> bool:
    """Return whether the set stays the same when its borders move by `LEAST_GAP`."""
    count = np.isfinite(processors.scores(case)).sum()
    for sign in (-1, 1):
        moved: dict[str, Any] = dict(case.settings)
        moved["min_p"] *= 1 + sign * LEAST_GAP
        moved["top_p"] += sign * min(LEAST_GAP, moved["top_p"] / 2) * (moved["top_p"] < 1)
        moved["min_p"] = min(moved["min_p"], 1.0)
        if np.isfinite(processors.scores(case._replace(settings=moved))).sum() != count:
            return False
    return True


def draw(random: np.random.Generator, processors: Processors) -> Case:
    """Return a case in which no token is so near a border that rounding decides."""
    while True:
        size = int(random.choice(SIZES))
        kinds = rows(random, size)
        kind = str(random.choice(list(kinds)))
        settings = {name: random.choice(values).item() for name, values in CHOICES.items()}
        settings["top_k"] = int(settings["top_k"])
        ids = random.integers(size, size=random.integers(6)).astype(np.int32)
        case = Case(kinds[kind], ids, settings)
        if kind in ("equal", "alone", "ties") or is_clear(processors, case):
            return case


def main() -> None:
    random = np.random.default_rng(35)
    processors = Processors()
    cases = [draw(random, processors) for _ in range(CASES)]
    scores = [processors.scores(case) for case in cases]
    np.savez_compressed(
        TARGET,
        sizes=np.array([len(case.logits) for case in cases]),
        logits=np.concatenate([case.logits for case in cases]),
        kept=np.concatenate([np.isfinite(row) for row in scores]),
        probabilities=np.concatenate([probabilities(row) for row in scores]).astype(np.float32),
        counts=np.array([len(case.ids) for case in cases]),
        ids=np.concatenate([case.ids for case in cases]),
        settings=np.array([[case.settings[name] for name in SETTINGS] for case in cases]),
    )
    print(f"{TARGET}: {len(cases)} cases, {TARGET.stat().st_size} bytes")


if __name__ == "__main__":
    main()
