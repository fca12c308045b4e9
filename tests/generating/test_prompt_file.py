"""Files of prompts: what a line may have, and what its answer is known by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lfm2kit.checkpoint.config import model_spec, parse_config
from lfm2kit.errors import Lfm2kitError
from lfm2kit.generating.language import Language
from lfm2kit.generating.options import Generation
from lfm2kit.generating.prompt_file import Asked, Broken, read_prompts
from tests.chat.folders import golden_tokenizer
from tests.generating.folders import CONFIG, model_folder


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Language:
    folder = model_folder(tmp_path_factory.mktemp("model") / "small")
    return Language(folder, model_spec(parse_config(CONFIG), tied=True))


def read(
    folder: Path, language: Language, *lines: bytes, model: str = "m", seed: int = 9, **options: Any
) -> list[Asked | Broken]:
    path = folder / "prompts.jsonl"
    path.write_bytes(b"\n".join(lines))
    return read_prompts(path, language, Generation(**options), seed, model)


def key_of(folder: Path, language: Language, line: dict[str, Any], **options: Any) -> str:
    (one,) = read(folder, language, json.dumps(line).encode(), **options)
    assert isinstance(one, Asked)
    return one.key


def test_a_lines_options_come_before_those_of_all(language: Language, tmp_path: Path) -> None:
    first, second, third = read(
        tmp_path,
        language,
        b'{"prompt": "a", "temperature": 0, "n": 2, "stop": ["x"]}',
        b"  ",
        b'{"messages": [{"role": "user", "content": "a"}], "seed": 4}\r',
        b'{"prompt": "b"}',
        b"",
        max_tokens=5,
        top_k=3,
    )
    assert isinstance(first, Asked)
    assert isinstance(second, Asked)
    assert isinstance(third, Asked)
    assert [first.number, second.number, third.number] == [1, 3, 4]
    assert (first.request.n, first.request.sampling.temperature) == (2, 0)
    assert first.options.stop == ["x"]
    assert [one.request.sampling.seed for one in (first, second, third)] == [9, 4, 9]
    assert {one.request.sampling.top_k for one in (first, second, third)} == {3}
    assert {one.request.max_tokens for one in (first, second, third)} == {5}
    said = golden_tokenizer().decode(second.request.ids.tolist(), special=True)
    assert said.startswith("<|startoftext|><|im_start|>user\na<|im_end|>")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"prompt": ""}', "the prompt is empty"),
        (b'{"prompt": "a"', "not readable JSON"),
        (b'{"prompt": "\xff"}', "not readable JSON"),
        (b'["a"]', "expected a JSON object"),
        (b"{}", "expected 'prompt' or 'messages'"),
        (b'{"prompt": "a", "messages": []}', "one of them alone"),
        (b'{"prompt": ["a"]}', "'prompt' is not a text"),
        (b'{"messages": "a"}', "'messages' is not a list of messages"),
        (b'{"messages": []}', "a chat needs at least one message"),
        (b'{"messages": ["a"]}', "a message is 'a'"),
        (b'{"prompt": "\\ud800"}', "half of a surrogate pair"),
        (b'{"prompt": "a", "system": "b"}', "give 'messages' instead of the prompt"),
        (b'{"prompt": "a", "temprature": 1}', "unknown option 'temprature'"),
        (b'{"prompt": "a", "context": 9}', "unknown option 'context'"),
        (b'{"prompt": "a", "top_p": 0}', "top_p=0: expected"),
        (b'{"prompt": "a", "max_tokens": 1.5}', "max_tokens=1.5: expected"),
        (b'{"prompt": "a", "max_tokens": 500}', "max_tokens may be up to 254"),
        (b'{"prompt": "a", "stop": "x"}', "stop='x': expected a list"),
        (b'{"prompt": "a", "seed": 1e999}', "not readable JSON"),
    ],
)
def test_a_broken_line_says_why(
    line: bytes, words: str, language: Language, tmp_path: Path
) -> None:
    first, second = read(tmp_path, language, line, b'{"prompt": "a"}')
    assert isinstance(first, Broken)
    assert words in first.why
    assert not first.why.startswith("a line:")
    assert isinstance(second, Asked)


def test_a_file_without_prompts_is_refused(language: Language, tmp_path: Path) -> None:
    with pytest.raises(Lfm2kitError, match="there is no prompt in it"):
        read(tmp_path, language, b" \n\n")
    with pytest.raises(Lfm2kitError, match="empty"):
        read(tmp_path, language, b"")
    with pytest.raises(Lfm2kitError, match="nosuch"):
        read_prompts(tmp_path / "nosuch", language, Generation(), 0, "m")


def test_the_key_changes_with_all_that_an_answer_depends_on(
    language: Language, tmp_path: Path
) -> None:
    line: dict[str, Any] = {"prompt": "a", "max_tokens": 5}
    key = key_of(tmp_path, language, line)
    assert key_of(tmp_path, language, {"prompt": "a"}, max_tokens=5) == key
    assert key_of(tmp_path, language, line, seed=10) == key  # one that was drawn
    for changed in (
        {"prompt": "b"},
        {"seed": 9},
        {"max_tokens": 6},
        {"min_tokens": 1},
        {"temperature": 0.5},
        {"stop": ["x"]},
        {"think": "hide"},
        {"n": 2},
    ):
        assert key_of(tmp_path, language, line | changed) != key, changed
    assert key_of(tmp_path, language, line, model="other") != key


def test_a_line_may_have_a_bias_and_a_constraint_of_its_own(
    language: Language, tmp_path: Path
) -> None:
    lines = [
        {"prompt": "a", "logit_bias": {"65": -5}},
        {"prompt": "a", "json_schema": {"type": "object"}},
        {"prompt": "a", "regex": None},
        {"prompt": "a", "regex": "("},
        {"prompt": "a", "logit_bias": {"x": 1}},
    ]
    first, second, third, *broken = read(
        tmp_path, language, *(json.dumps(line).encode() for line in lines), regex="[a-c]"
    )
    assert isinstance(first, Asked)
    assert isinstance(second, Asked)
    assert isinstance(third, Asked)
    assert first.request.sampling.logit_bias == {65: -5.0}
    assert first.options.constraint == ("regex", "[a-c]")
    assert second.options.constraint == ("json_schema", '{"type":"object"}')
    assert first.request.constraint is not second.request.constraint is not None
    assert third.request.constraint is None
    assert [one.why for one in broken if isinstance(one, Broken)] == [
        "the regex cannot be used: unclosed group",
        "logit_bias: 'x' is not a token id, which is a whole number from 0",
    ]


def test_an_answers_key_says_what_restricts_it(language: Language, tmp_path: Path) -> None:
    others: list[dict[str, Any]] = [
        {},
        {"logit_bias": {1: 2.0}},
        {"regex": "a"},
        {"grammar": 'start: "a"'},
        {"logprobs": 0},
        {"prompt_logprobs": 0},
    ]
    keys = [key_of(tmp_path, language, {"prompt": "a"}, **options) for options in others]
    assert len({*keys}) == len(keys)
