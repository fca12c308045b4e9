"""The NumPy sampler: from rows of logits to tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lfm2kit.engine.drawing import (
    ALL_EXCLUDED,
    NOT_FINITE,
    Drawn,
    NotANumber,
    NumPySampler,
    Row,
    whole_weights,
)
from lfm2kit.engine.filters import Kept, kept
from lfm2kit.engine.sampling import Sampling

Floats = npt.NDArray[np.float32]

OF_LFM2 = Sampling(temperature=0.3, min_p=0.15, repetition_penalty=1.05)
GREEDY = Sampling(temperature=0)
NO_IDS = np.zeros(0, np.int32)
ALL = [
    Sampling(),
    OF_LFM2,
    GREEDY,
    Sampling(top_k=5, top_p=0.9, presence_penalty=0.5, frequency_penalty=0.1),
    Sampling(temperature=2, logit_bias={3: 2.0}, seed=9),
]


def row(sampling: Sampling, position: int = 0, seed: int = 0, **others: Any) -> Row:
    given = {"prompt": NO_IDS, "generated": NO_IDS} | others
    return Row(sampling, seed, position, **given)


def drawn(logits: Any, sampling: Sampling, **others: Any) -> Drawn | NotANumber:
    """Draw from one row, whose logits nobody may write."""
    array = np.array(logits, np.float32)
    array.flags.writeable = False
    return NumPySampler().draw(array[None], [row(sampling, **others)])[0]


def token(logits: Any, sampling: Sampling, **others: Any) -> int:
    result = drawn(logits, sampling, **others)
    assert isinstance(result, Drawn)
    return result.token_id


def random_logits(rows: int, size: int = 200, seed: int = 0) -> Floats:
    normal = np.random.default_rng(seed).normal(size=(rows, size))
    return (3 * normal).astype(np.float32)


def bits(allowed: list[bool]) -> npt.NDArray[np.uint32]:
    """Return a mask, word by word."""
    words = np.zeros(-(-len(allowed) // 32), np.uint32)
    for token_id, is_allowed in enumerate(allowed):
        words[token_id // 32] |= np.uint32(is_allowed << token_id % 32)
    return words


def test_greedy_takes_the_best_and_of_equal_ones_the_first() -> None:
    assert token([0, 2, 1, 2], GREEDY) == 1
    assert token([-np.inf, -5], GREEDY) == 1


def test_greedy_obeys_penalties_bias_and_masks() -> None:
    logits = [3, 2, 1.9]
    seen = np.array([0], np.int32)
    assert token(logits, Sampling(temperature=0, repetition_penalty=2), prompt=seen) == 1
    assert token(logits, Sampling(temperature=0, presence_penalty=2), generated=seen) == 1
    assert token(logits, Sampling(temperature=0, logit_bias={2: 5})) == 2
    assert token(logits, GREEDY, forbidden=(0, 1)) == 2
    assert token(logits, GREEDY, mask=bits([False, True, True])) == 1


def test_penalties_act_before_tokens_are_removed() -> None:
    """A bias of 100 draws a token that top-k would have removed, as OpenAI promises."""
    assert token([5, 0, 0], Sampling(top_k=1, logit_bias={2: 100})) == 2
    assert token([5, 0, 0], Sampling(min_p=0.5, logit_bias={0: -100, 2: 1})) == 2


@pytest.mark.parametrize("sampling", ALL)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_no_token_is_drawn_from_what_is_not_finite(sampling: Sampling, bad: float) -> None:
    for place in (0, 63, 199):
        logits = random_logits(1)[0]
        logits[place] = bad
        result = drawn(logits, sampling, position=17, logprobs=3, forbidden=(place,))
        assert result == NotANumber(17, NOT_FINITE)
    assert str(result) == (
        "no token can be drawn at position 17: the model's logits hold NaN or infinity"
    )


@pytest.mark.parametrize("sampling", ALL)
def test_no_token_is_drawn_where_all_are_excluded(sampling: Sampling) -> None:
    logits = random_logits(1, 40)[0]
    nothing = NotANumber(3, ALL_EXCLUDED)
    assert drawn(np.full(40, -np.inf), sampling, position=3) == nothing
    assert drawn(np.full(40, np.finfo(np.float32).min), sampling, position=3) == nothing
    assert drawn(logits, sampling, position=3, mask=bits([False] * 40)) == nothing
    assert drawn(logits, sampling, position=3, forbidden=tuple(range(40))) == nothing


def test_a_bad_row_does_not_touch_its_neighbours() -> None:
    logits = random_logits(3)
    alone = NumPySampler().draw(logits[::2], [row(Sampling(), 0), row(Sampling(), 2)])
    logits[1, 5] = np.nan
    together = NumPySampler().draw(logits, [row(Sampling(), at) for at in range(3)])
    assert [together[0], together[2]] == alone
    assert together[1] == NotANumber(1, NOT_FINITE)


@pytest.mark.parametrize("size", [1, 31, 32, 33, 64, 100])
def test_a_mask_allows_exactly_its_bits(size: int) -> None:
    random = np.random.default_rng(size)
    for trial in range(20):
        allowed = (random.random(size) < 0.3).tolist()
        allowed[trial % size] = True
        mask = bits(allowed)
        uniform = np.zeros(size, np.float32)
        ids = {token(uniform, Sampling(), position=at, mask=mask) for at in range(30)}
        assert ids <= set(np.flatnonzero(allowed).tolist())


def test_a_mask_may_be_shorter_or_longer_than_the_logits() -> None:
    assert token([0, 1] + [2] * 38, GREEDY, mask=np.array([3], np.uint32)) == 1
    assert token([0, 1], GREEDY, mask=np.array([1, 2**32 - 1], np.uint32)) == 0


def test_a_token_depends_neither_on_the_batch_nor_on_the_order_of_rows() -> None:
    logits = random_logits(40)
    rows = [
        row(ALL[at % len(ALL)], at, seed=at % 3, generated=np.arange(at, dtype=np.int32))
        for at in range(40)
    ]
    together = NumPySampler().draw(logits, rows)
    alone = [NumPySampler().draw(logits[at : at + 1], rows[at : at + 1])[0] for at in range(40)]
    backwards = NumPySampler().draw(np.asfortranarray(logits[::-1]), rows[::-1])[::-1]
    assert together == alone == backwards


def test_tokens_of_a_seed_never_change() -> None:
    places = np.arange(12 * 50).reshape(12, 50)
    logits = (places * 7919 % 1000 / 250).astype(np.float32)
    rows = [row(Sampling(temperature=1.5), at, seed=123) for at in range(12)]
    ids = [one.token_id for one in NumPySampler().draw(logits, rows) if isinstance(one, Drawn)]
    assert ids == [17, 24, 12, 4, 16, 35, 43, 21, 16, 7, 8, 21]


@pytest.mark.parametrize("sampling", [Sampling(temperature=2), Sampling(top_k=5), OF_LFM2])
def test_tokens_are_drawn_as_often_as_their_probabilities_say(sampling: Sampling) -> None:
    """Their numbers lie within six standard deviations; the seed is fixed."""
    draws, logits = 3000, random_logits(1, 12)
    there = kept(logits[0], sampling)
    expected = np.zeros(12)
    expected[there.ids] = draws * there.weights() / there.weights().sum()
    rows = [row(sampling, at, seed=1) for at in range(draws)]
    results = NumPySampler().draw(np.broadcast_to(logits[0], (draws, 12)), rows)
    counts = np.bincount([one.token_id for one in results if isinstance(one, Drawn)], minlength=12)
    assert (np.abs(counts - expected) <= 6 * np.sqrt(expected)).all()


def test_other_seeds_and_positions_draw_other_tokens() -> None:
    uniform = np.zeros(1000, np.float32)
    drawn_ids = {
        token(uniform, Sampling(), position=at, seed=seed) for at in range(10) for seed in range(10)
    }
    assert len(drawn_ids) > 90


def test_weights_are_whole_and_their_sums_exact() -> None:
    scores = random_logits(1, 5000)[0]
    weights = whole_weights(Kept(np.arange(5000), scores))
    assert weights.max() == 2**40
    assert int(weights.sum()) == sum(weights.tolist()) == sum(weights[::-1].tolist())
    np.testing.assert_allclose(
        weights / weights.sum(), np.exp(scores) / np.exp(scores).sum(), atol=1e-7
    )


def test_logprobs_are_of_the_distribution_before_anything_changes_it() -> None:
    logits = random_logits(1)[0]
    mask = bits([at % 7 == 0 for at in range(200)])
    result = drawn(logits, OF_LFM2, mask=mask, prompt=np.arange(9, dtype=np.int32), logprobs=5)
    assert isinstance(result, Drawn)
    own = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    assert result.logprob == pytest.approx(own[result.token_id])
    assert [token_id for token_id, _ in result.best] == np.argsort(-logits)[:5].tolist()


def test_logprobs_are_only_there_if_asked_for() -> None:
    assert drawn([1, 2], GREEDY) == Drawn(1, None, ())
    assert drawn([1, 1], GREEDY, logprobs=0) == Drawn(0, pytest.approx(np.log(0.5)), [])
