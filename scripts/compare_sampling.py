"""Compares what may be drawn with transformers, on logits that hypothesis makes.

    PYTHONPATH=. oracle/bin/python scripts/compare_sampling.py [EXAMPLES]     (see make_chats.py)

The tests do not run it; they have tests/engine/transformers.npz.  Where rounding decides whether a
token is kept, the sets may differ; then they must be equal after a border has moved by `NEAR`.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lfm2kit.engine.filters import kept
from lfm2kit.engine.penalties import penalise
from lfm2kit.engine.sampling import Sampling

sys.path.insert(0, str(Path(__file__).parent))
from transformers_sampling import SETTINGS, Case, Floats, Processors, probabilities

NEAR = 2e-6  # relative to min_p and to top_p
MOST = 1e-6  # that probabilities may differ by
PROCESSORS = Processors()
SEEN: Counter[str] = Counter()

numbers = st.one_of(
    st.floats(-60, 60, width=32),
    st.sampled_from([-np.inf, 0.0, 1.0, 2.0, -1.5]),
)
sizes = st.one_of(st.integers(1, 24), st.integers(25, 400))


@st.composite
def logits_of(draw: st.DrawFn) -> Floats:
    size = draw(sizes)
    kind = draw(st.sampled_from(["any", "equal", "alone", "normal"]))
    SEEN[kind] += 1
    if kind == "normal":
        scale = draw(st.floats(0.1, 10))
        random = np.random.default_rng(draw(st.integers(0, 2**32)))
        return (scale * random.normal(size=size)).astype(np.float32)
    if kind == "any":
        logits = draw(arrays(np.float32, size, elements=numbers))
    else:
        filler = 0.75 if kind == "equal" else -np.inf
        logits = np.full(size, filler, np.float32)
    logits[draw(st.integers(0, size - 1))] = 0.75
    return logits


samplings = st.builds(
    Sampling,
    temperature=st.one_of(st.floats(0.05, 3), st.sampled_from([0.3, 1.0])),
    top_k=st.one_of(st.just(0), st.integers(1, 400)),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 1), st.sampled_from([0.9, 0.5])),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 1), st.sampled_from([0.15, 1.0])),
    repetition_penalty=st.one_of(st.just(1.0), st.floats(0.5, 2)),
)


def agree(expected: Floats, logits: Floats, sampling: Sampling) -> bool:
    """Return whether kept sets and probabilities are equal.

    Which of the tokens that tie with the least likely are kept does not matter, only how many.
    """
    there = kept(logits, sampling)
    actual = np.zeros(len(logits))
    actual[there.ids] = there.weights() / there.weights().sum()
    differ = np.isfinite(expected)
    differ[there.ids] ^= True
    if np.isfinite(expected).sum() != len(there.ids):
        return False
    gap = np.abs(np.sort(probabilities(expected)) - np.sort(actual)).max()
    return bool(gap <= MOST and (logits[differ] == logits[there.ids].min()).all())


def moved(sampling: Sampling) -> list[Sampling]:
    steps = (-NEAR, 0, NEAR)
    return [
        replace(
            sampling,
            min_p=min(sampling.min_p * (1 + a), 1.0),
            top_p=sampling.top_p if sampling.top_p == 1 else min(sampling.top_p * (1 + b), 1.0),
        )
        for a, b in product(steps, steps)
    ]


@given(logits_of(), samplings, st.lists(st.integers(0, 399), max_size=5))
def compare(logits: Floats, sampling: Sampling, ids: list[int]) -> None:
    before = np.array([i % len(logits) for i in ids], np.int32)
    case = Case(logits, before, {name: getattr(sampling, name) for name in SETTINGS})
    expected = PROCESSORS.scores(case)
    changed = logits.copy()
    penalise(changed, sampling, before, before[:0])
    SEEN["all"] += 1
    if not agree(expected, changed, sampling):
        SEEN["near a border"] += 1
        assert any(agree(expected, changed, near) for near in moved(sampling)), expected


if __name__ == "__main__":
    examples = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    quiet = list(HealthCheck)
    settings(max_examples=examples, deadline=None, database=None, suppress_health_check=quiet)(
        compare
    )()
    print(dict(SEEN))
