"""Options of generated text: bounds, defaults, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from lfm2kit.engine.sampling import Sampling
from lfm2kit.errors import Lfm2kitError
from lfm2kit.generating.options import Generation, generation


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"temperature": -0.1}, "temperature=-0.1: expected"),
        ({"temperature": float("nan")}, "temperature=nan: expected"),
        ({"temperature": "hot"}, "temperature='hot': expected"),
        ({"top_p": 0}, "top_p=0: expected a number above 0, up to 1"),
        ({"top_p": 1.01}, "top_p=1.01: expected"),
        ({"min_p": -0.1}, "min_p=-0.1: expected a number from 0 to 1"),
        ({"min_p": 1.1}, "min_p=1.1: expected"),
        ({"top_k": -1}, "top_k=-1: expected a whole number of 0 or more"),
        ({"top_k": 1.5}, "top_k=1.5: expected a whole number"),
        ({"repetition_penalty": 0}, "repetition_penalty=0: expected"),
        ({"repetition_penalty": -1}, "repetition_penalty=-1: expected"),
        ({"presence_penalty": float("inf")}, "presence_penalty=inf: expected"),
        ({"max_tokens": 0}, "max_tokens=0: expected a whole number of 1 or more"),
        ({"max_tokens": True}, "max_tokens=True: expected a whole number"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens=5: more than max_tokens=4"),
        ({"logprobs": 21}, "logprobs=21: lfm2kit takes up to 20"),
        ({"prompt_logprobs": -1}, "prompt_logprobs=-1: expected a whole number of 0 or more"),
        ({"logit_bias": [1]}, "logit_bias is [1]; expected a bias by token id"),
        ({"logit_bias": {1: "x"}}, "logit_bias: the bias of token 1 is 'x'; expected"),
        ({"regex": 1}, "regex=1: expected a text"),
        ({"speculate": "no"}, "speculate='no': expected ngram"),
        ({"speculate": ["ngram"]}, "speculate=['ngram']: expected ngram"),
        ({"grammar": ["a"]}, "grammar=['a']: expected a text"),
        ({"json_schema": "{"}, "the JSON schema is not JSON"),
        ({"json_schema": 5}, "the JSON schema is 5; expected an object"),
        ({"json_schema": {"enum": {1}}}, "the JSON schema is not JSON"),
        ({"regex": "a", "json_schema": {}}, "json_schema and regex: give only one of them"),
        ({"n": 0}, "n=0: expected"),
        ({"n": 129}, "n=129: lfm2kit takes up to 128"),
        ({"seed": -1}, "seed=-1: expected"),
        ({"stop": "end"}, "stop='end': expected a list of texts"),
        ({"stop": ["a", 1]}, "stop=['a', 1]: expected a list of texts"),
        ({"stop": [""]}, "stop=['']: no text to stop at may be empty"),
        ({"think": "maybe"}, "think='maybe': expected show or hide"),
        ({"special": 1}, "special=1: expected true or false"),
        ({"system": 1}, "system=1: expected a text"),
        ({"context": 0}, "context=0: expected"),
        ({"sequences": 0}, "sequences=0: expected"),
        ({"tempreature": 1}, "unknown option 'tempreature'; available: .* Did you mean 'temp"),
    ],
)
def test_a_value_out_of_bounds_is_named(given: dict[str, Any], words: str) -> None:
    with pytest.raises(Lfm2kitError, match=words.replace("[", r"\[").replace("]", r"\]")):
        generation(given)


def test_what_is_not_given_is_as_the_defaults_say() -> None:
    defaults = Sampling(temperature=0.3, min_p=0.15, repetition_penalty=1.05)
    made = Generation(top_k=5, min_p=0.0).sampling(defaults, seed=9)
    expected = Sampling(temperature=0.3, top_k=5, repetition_penalty=1.05, seed=9)
    assert made == expected
    assert Generation(seed=3).sampling(defaults, seed=9).seed == 3
