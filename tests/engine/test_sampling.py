"""What a user may ask of the choice of tokens."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest

from lfm2kit.engine.sampling import Sampling
from lfm2kit.errors import Lfm2kitError

NAN, INF = float("nan"), float("inf")

BAD: list[tuple[str, Any]] = [
    *[("temperature", value) for value in (-1, -1e-9, 1e-9, 1e9, NAN, INF, "0.3", None, True)],
    *[("top_k", value) for value in (-1, 2.0, 1.5, 2**31, True, None)],
    *[("top_p", value) for value in (0, -0.1, 1.0001, NAN, INF, "1")],
    *[("min_p", value) for value in (-0.1, 1.0001, NAN, INF, None)],
    *[("repetition_penalty", value) for value in (0, -1, 1e-9, NAN, INF, [1.1])],
    *[("presence_penalty", value) for value in (NAN, INF, -INF, 1e9, "1")],
    *[("frequency_penalty", value) for value in (NAN, INF, -INF, -1e9, 10**400)],
    *[("seed", value) for value in (-1, 2**63, 1.0, "1", None)],
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_value_out_of_range_is_one_line_that_names_it(name: str, value: object) -> None:
    with pytest.raises(Lfm2kitError) as caught:
        Sampling(**{name: value})
    line = str(caught.value)
    assert line.startswith(name)
    assert ": expected " in line
    assert "\n" not in line
    assert len(line) < 200


@pytest.mark.parametrize(
    ("bias", "line"),
    [
        ({-1: 1.0}, "logit_bias: -1 is not a token id, which is a whole number from 0"),
        ({"7": 1.0}, "logit_bias: '7' is not a token id, which is a whole number from 0"),
        ({True: 1.0}, "logit_bias: True is not a token id, which is a whole number from 0"),
        ({7: NAN}, "logit_bias: the bias of token 7 is nan; expected a number from -1000 to 1000"),
        (
            {7: -INF},
            "logit_bias: the bias of token 7 is -inf; expected a number from -1000 to 1000",
        ),
        ([1], "logit_bias is [1]; expected a bias by token id"),
    ],
)
def test_a_bias_is_a_number_by_token_id(bias: Any, line: str) -> None:
    with pytest.raises(Lfm2kitError) as caught:
        Sampling(logit_bias=bias)
    assert str(caught.value) == line


def test_the_sentence_says_what_is_expected() -> None:
    with pytest.raises(Lfm2kitError) as caught:
        Sampling(temperature=-1)
    assert str(caught.value) == (
        "temperature=-1: expected 0, which is greedy, or a number from 1e-05 to 1000"
    )


def test_a_bias_beyond_the_vocabulary_is_refused_when_the_model_is_known() -> None:
    Sampling().check_ids(1)
    Sampling(logit_bias={79: 1}).check_ids(80)
    with pytest.raises(Lfm2kitError) as caught:
        Sampling(logit_bias={80: 1, 3: 1}).check_ids(80)
    assert str(caught.value) == "logit_bias: token id 80 is outside the vocabulary of 80"


def test_numbers_of_numpy_become_pythons() -> None:
    sampling = Sampling(temperature=np.float32(0.5), top_k=np.int64(3), seed=np.uint8(1))
    assert [type(v) for v in (sampling.temperature, sampling.top_k, sampling.seed)] == [
        float,
        int,
        int,
    ]


def test_the_bias_is_a_copy_and_all_of_it_travels_between_ranks() -> None:
    bias = OrderedDict({3: 1})
    sampling = Sampling(logit_bias=bias)
    bias[4] = 2
    assert sampling.logit_bias == {3: 1.0}
    assert pickle.loads(pickle.dumps(sampling)) == sampling
    assert hash(sampling) == hash(Sampling(logit_bias={3: 1}))


def test_only_a_temperature_of_0_is_greedy() -> None:
    assert Sampling(temperature=0).is_greedy
    assert not Sampling(temperature=1e-5).is_greedy
