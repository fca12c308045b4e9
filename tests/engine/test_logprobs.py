"""Logprobs are of the model's own distribution."""

from __future__ import annotations

import numpy as np
import pytest

from lfm2kit.engine.logprobs import logprobs


def test_logprobs_are_those_of_softmax() -> None:
    logits = (3 * np.random.default_rng(0).normal(size=500)).astype(np.float32)
    wide = logits.astype(np.float64)
    expected = wide - np.log(np.exp(wide).sum())
    chosen, best = logprobs(logits, 7, 20)
    assert chosen == pytest.approx(expected[7], abs=1e-12)
    assert [token_id for token_id, _ in best] == np.argsort(-expected)[:20].tolist()
    assert [value for _, value in best] == pytest.approx(np.sort(expected)[::-1][:20], abs=1e-12)


def test_of_equal_tokens_the_lowest_id_comes_first() -> None:
    logits = np.array([0, 1, 0, 1, 0], np.float32)
    assert [token_id for token_id, _ in logprobs(logits, 0, 4)[1]] == [1, 3, 0, 2]
    assert [token_id for token_id, _ in logprobs(logits, 0, 1)[1]] == [1]


def test_what_has_no_probability_is_not_listed() -> None:
    logits = np.array([-np.inf, 1, -np.inf], np.float32)
    assert logprobs(logits, 1, 3) == (0.0, [(1, 0.0)])


def test_there_may_be_fewer_tokens_than_asked_for_and_none_may_be_asked_for() -> None:
    logits = np.zeros(2, np.float32)
    assert len(logprobs(logits, 0, 20)[1]) == 2
    assert logprobs(logits, 0, 0) == (pytest.approx(-np.log(2)), [])


def test_large_logits_do_not_overflow() -> None:
    chosen, _ = logprobs(np.array([1e30, 1e30, -1e30], np.float32), 1, 1)
    assert chosen == pytest.approx(-np.log(2))
