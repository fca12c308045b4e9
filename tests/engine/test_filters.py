"""Which tokens may be drawn, and their probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lfm2kit.engine.drawing import whole_weights
from lfm2kit.engine.filters import kept
from lfm2kit.engine.penalties import penalise
from lfm2kit.engine.sampling import Sampling

Floats = npt.NDArray[np.float32]
FIXTURE = Path(__file__).parent / "transformers.npz"
SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def probabilities(logits: Floats, sampling: Sampling) -> npt.NDArray[np.float64]:
    there = kept(logits, sampling)
    weights = whole_weights(there)
    result = np.zeros(len(logits))
    result[there.ids] = weights / weights.sum()
    return result


def cases() -> list[Any]:
    with np.load(FIXTURE) as data:
        by_token = np.cumsum(data["sizes"])[:-1]
        logits = np.split(data["logits"], by_token)
        expected = np.split(data["probabilities"], by_token)
        is_kept = np.split(data["kept"], by_token)
        ids = np.split(data["ids"], np.cumsum(data["counts"])[:-1])
        return list(zip(logits, ids, data["settings"].tolist(), is_kept, expected, strict=True))


@pytest.mark.parametrize("case", cases(), ids=range(len(cases())))
def test_sets_and_probabilities_are_those_of_transformers(case: Any) -> None:
    """Of tokens that tie at a border, transformers keeps any, and here the lowest ids are kept."""
    logits, ids, numbers, is_kept, expected = case
    sampling = Sampling(
        **dict(zip(SETTINGS, [numbers[0], int(numbers[1]), *numbers[2:]], strict=True))
    )
    penalise(logits, sampling, ids, ids[:0])
    actual = probabilities(logits, sampling)
    there = kept(logits, sampling)
    np.testing.assert_allclose(np.sort(actual), np.sort(expected), atol=1e-6)
    assert len(there.ids) == is_kept.sum()
    border = logits[there.ids].min()
    np.testing.assert_allclose(actual[logits > border], expected[logits > border], atol=1e-6)
    assert is_kept[logits > border].all()
    assert not is_kept[logits < border].any()


def by_definition(logits: Floats, sampling: Sampling) -> list[int]:
    """Return the ids that are kept, by a sort of the whole row, as transformers does it."""
    scores = logits / np.float32(sampling.temperature)
    order = sorted((i for i in range(len(logits)) if logits[i] > -np.inf), key=lambda i: -scores[i])
    if sampling.top_k:
        order = [
            i for i in order if scores[i] >= scores[order[min(sampling.top_k, len(order)) - 1]]
        ]
    if sampling.top_p < 1:
        weights = np.exp(scores[order].astype(np.float64) - scores[order[0]])
        ascending = (weights / weights.sum()).astype(np.float32)[::-1]
        sums = np.cumsum(ascending, dtype=np.float64).astype(np.float32)[::-1]
        order = [
            i for i, s in zip(order, sums, strict=True) if s > np.float32(1 - sampling.top_p)
        ] or order[:1]
    weights = np.exp(scores[order].astype(np.float64) - scores[order[0]])
    return sorted(i for i, w in zip(order, weights, strict=True) if w >= sampling.min_p)


numbers = st.one_of(st.floats(-60, 60, width=32), st.sampled_from([-np.inf, 0.0, 1.0, 2.0]))


@settings(max_examples=150, deadline=None)
@given(
    arrays(np.float32, st.integers(1, 60), elements=numbers),
    st.sampled_from([0.05, 0.3, 1.0, 3.0]),
    st.sampled_from([0, 1, 3, 50]),
    st.sampled_from([1.0, 0.9, 0.5, 1e-9]),
    st.sampled_from([0.0, 0.15, 1.0, 1e-9]),
)
def test_sets_are_those_of_the_definitions(
    logits: Floats, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits[0] = max(logits[0], -60)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assert kept(logits, sampling).ids.tolist() == by_definition(logits, sampling)


@pytest.mark.parametrize("step", [0, 0.25])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.3, min_p=0.15),
        Sampling(top_p=0.9),
        Sampling(temperature=3, top_k=50),
        Sampling(top_k=50, top_p=0.95, min_p=0.05),
    ],
)
def test_long_rows_are_those_of_the_definitions(sampling: Sampling, step: float) -> None:
    logits = (3 * np.random.default_rng(0).normal(size=20_000)).astype(np.float32)
    if step:  # many ties
        logits = np.round(logits / np.float32(step)) * np.float32(step)
    assert kept(logits, sampling).ids.tolist() == by_definition(logits, sampling)


def test_logits_that_tie_only_after_the_division_are_kept() -> None:
    """Neighbouring float32 numbers below 16 often have the same third."""
    logits = (16 - np.arange(1, 4097) * 2.0**-20).astype(np.float32)[::-1]
    more = 0
    for top_k in range(1, 61):
        sampling = Sampling(temperature=3, top_k=top_k)
        ids = kept(logits, sampling).ids.tolist()
        assert ids == by_definition(logits, sampling)
        more += len(ids) > top_k
    assert more > 10


@pytest.mark.parametrize(
    ("logits", "sampling", "expected"),
    [
        ([1, 3, 2, 3], Sampling(top_k=1), [1, 3]),  # all that tie with the last
        ([1, 2, 2, 3], Sampling(top_k=2), [1, 2, 3]),
        ([0] * 10, Sampling(top_p=0.9), list(range(9))),
        ([0] * 10, Sampling(top_p=1e-300), [0]),
        ([0] * 4, Sampling(top_p=0.5), [0, 1]),
        ([0] * 4, Sampling(min_p=1), [0, 1, 2, 3]),
        ([-np.inf, -np.inf, 5], Sampling(), [2]),
        ([-np.inf, 4, 5], Sampling(top_k=3), [1, 2]),
        ([1e30, -1e30, 0], Sampling(temperature=1e-5), [0, 1, 2]),
        ([-1e30, -1e30], Sampling(temperature=1e-5, top_p=0.9, min_p=0.1), [0, 1]),
        ([1e30, np.finfo(np.float32).min], Sampling(temperature=1e-5), [0]),
    ],
)
def test_what_is_kept_of_ties_and_of_extremes(
    logits: list[float], sampling: Sampling, expected: list[int]
) -> None:
    assert kept(np.array(logits, np.float32), sampling).ids.tolist() == expected


def test_top_p_looks_at_what_top_k_left_and_min_p_at_both() -> None:
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    assert kept(logits, Sampling(top_p=0.69)).ids.tolist() == [0, 1]
    assert kept(logits, Sampling(top_k=2, top_p=0.56)).ids.tolist() == [0]  # 4/7 of two
    assert kept(logits, Sampling(top_p=0.85, min_p=0.6)).ids.tolist() == [0, 1]


def test_temperature_comes_before_the_sets() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    assert kept(logits, Sampling(min_p=0.5)).ids.tolist() == [0, 1]
    assert kept(logits, Sampling(temperature=0.5, min_p=0.5)).ids.tolist() == [0]
