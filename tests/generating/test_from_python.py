"""`LFM2.generate`: pieces, whole answers, threads, tasks, and what is refused."""

from __future__ import annotations

import asyncio
import gc
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm2kit.batch import Batch
from lfm2kit.engine.drawing import NumPySampler
from lfm2kit.engine.engine import Engine
from lfm2kit.engine.logprobs import logprobs
from lfm2kit.errors import Lfm2kitError
from lfm2kit.generating.from_python import WRITER, language_of
from lfm2kit.generating.options import Generation
from lfm2kit.generating.writer import Writer
from lfm2kit.model import LFM2
from tests.core.small import build, small_spec
from tests.generating.folders import give_constraints_all_the_time, loaded, model_folder
from tests.generating.test_writer import assert_nothing_is_held

PROMPTS = ["It is a truth", "hello", "It is"]
OPTIONS: dict[str, Any] = {"seed": 3, "max_tokens": 12, "context": 128, "sequences": 3}
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LFM2:
    return loaded(model_folder(tmp_path_factory.mktemp("model") / "small"))


@pytest.fixture(autouse=True)
def all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    give_constraints_all_the_time(monkeypatch)


def writer_kept(model: LFM2) -> Writer:
    writer: Writer = model.kept[WRITER][1]
    return writer


def test_a_list_gives_the_texts_that_the_prompts_give_alone(model: LFM2) -> None:
    alone = ["".join(model.generate(prompt, **OPTIONS)) for prompt in PROMPTS]
    assert model.generate(PROMPTS, **OPTIONS) == alone
    assert len(set(alone)) == 3
    assert_nothing_is_held(writer_kept(model))


def test_text_comes_in_pieces_and_a_chat_is_one_prompt(model: LFM2) -> None:
    pieces = list(model.generate(HELLO, **OPTIONS))
    assert len(pieces) > 4
    assert all(pieces)
    assert model.generate([HELLO, HELLO], **OPTIONS) == ["".join(pieces)] * 2
    assert "".join(model.generate("hello", chat=True, **OPTIONS)) == "".join(pieces)


def test_several_answers_come_one_after_the_other(model: LFM2) -> None:
    texts = model.generate(PROMPTS[:2], n=2, **OPTIONS)
    assert len(set(texts)) == 4
    assert texts[::2] == model.generate(PROMPTS[:2], **OPTIONS)
    assert model.generate([], **OPTIONS) == []


def test_texts_of_one_thread_go_on_together(model: LFM2) -> None:
    alone = ["".join(model.generate(prompt, **OPTIONS)) for prompt in PROMPTS]
    texts = [model.generate(prompt, **OPTIONS) for prompt in PROMPTS]
    said = ["", "", ""]
    for _ in range(OPTIONS["max_tokens"] + 1):
        for place, text in enumerate(texts):
            said[place] += next(text, "")
            assert alone[place].startswith(said[place])
    assert said == alone


def test_threads_get_the_texts_that_they_get_alone(model: LFM2) -> None:
    alone = model.generate(PROMPTS, **OPTIONS)
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda p: "".join(model.generate(p, **OPTIONS)), PROMPTS * 3))
    assert together == alone * 3
    assert_nothing_is_held(writer_kept(model))


def test_a_text_that_is_dropped_is_cancelled(model: LFM2) -> None:
    text = iter(model.generate("hello", **OPTIONS))
    next(text)
    writer = writer_kept(model)
    assert writer._answers
    del text
    gc.collect()
    assert not writer._answers
    assert_nothing_is_held(writer)


def test_the_same_seed_gives_the_same_text_and_no_seed_another_one(
    model: LFM2, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lfm2kit.generating.from_python.drawn_seed", iter(range(1, 9)).__next__)
    hot = OPTIONS | {"temperature": 2.0, "max_tokens": 24}
    assert model.generate(["a"], **hot) == model.generate(["a"], **hot)
    del hot["seed"]
    assert model.generate(["a"], **hot) != model.generate(["a"], **hot)


def test_another_room_takes_another_engine(model: LFM2) -> None:
    model.generate(["a"], **OPTIONS)
    writer = writer_kept(model)
    model.generate(["a"], max_tokens=2)
    assert writer_kept(model) is writer
    model.generate(["a"], **OPTIONS | {"sequences": 2})
    assert writer_kept(model) is not writer


def test_a_text_of_no_asked_length_fits_into_the_room_that_is_kept(model: LFM2) -> None:
    greedy: dict[str, Any] = {"temperature": 0, "seed": 0}
    whole = "".join(model.generate("It is", context=256, sequences=1, **greedy))
    (first,) = model.generate(["It is"], context=128, sequences=1, max_tokens=9, **greedy)
    text = "".join(model.generate("It is", **greedy))
    assert whole.startswith(text.rstrip("\ufffd"))
    assert text.startswith(first.rstrip("\ufffd"))
    with pytest.raises(Lfm2kitError, match="the engine's 1 page of 128 tokens"):
        model.generate(["It is"], max_tokens=200)
    with pytest.raises(Lfm2kitError, match="the engine's 1 page of 128 tokens"):
        model.generate(["It is"], min_tokens=200)


def test_tasks_get_the_texts_that_they_get_alone(model: LFM2) -> None:
    async def text(prompt: str) -> str:
        return "".join([piece async for piece in model.generate_async(prompt, **OPTIONS)])

    async def all_texts() -> list[str]:
        return await asyncio.gather(*map(text, PROMPTS))

    assert asyncio.run(all_texts()) == model.generate(PROMPTS, **OPTIONS)


def test_a_task_that_is_cancelled_cancels_its_text(model: LFM2) -> None:
    begun = asyncio.Event()

    async def read() -> None:
        async for _ in model.generate_async("hello", **OPTIONS | {"max_tokens": 100}):
            begun.set()

    async def cancelled() -> None:
        task = asyncio.create_task(read())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert_nothing_is_held(writer_kept(model))


def test_what_is_wrong_shows_when_it_is_asked_for(model: LFM2) -> None:
    with pytest.raises(Lfm2kitError, match="the prompt is empty"):
        model.generate("")
    with pytest.raises(Lfm2kitError, match="unknown option 'tempreature'"):
        model.generate_async("a", tempreature=1)
    with pytest.raises(Lfm2kitError, match="n=2: several answers come whole"):
        model.generate("a", n=2)
    with pytest.raises(Lfm2kitError, match="generate_async takes one prompt"):
        model.generate_async(["a", "b"])  # type: ignore[arg-type]
    with pytest.raises(Lfm2kitError, match="a prompt is a text, a list of messages"):
        model.generate(5)  # type: ignore[call-overload]
    with pytest.raises(Lfm2kitError, match="context=500: the model's context has 256 tokens"):
        model.generate(["a"], context=500)


@pytest.mark.parametrize("prompt", [None, 5, b"ab", ["a", None], [5], [b"ab"], [{"a"}]])
def test_what_is_no_prompt_is_named_by_its_type(prompt: Any, model: LFM2) -> None:
    wrong = prompt[-1] if isinstance(prompt, list) else prompt
    with pytest.raises(Lfm2kitError, match=f"a prompt is .*; got {type(wrong).__name__}$"):
        model.generate(prompt)


def test_an_answer_that_fails_raises(model: LFM2, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Engine, chunks: object) -> None:
        raise ArithmeticError("broken")

    monkeypatch.setattr(Engine, "_run", fail)
    with pytest.raises(ArithmeticError, match="broken"):
        list(model.generate("a", **OPTIONS))
    with pytest.raises(ArithmeticError, match="broken"):
        model.generate(["a", "b"], **OPTIONS)
    monkeypatch.undo()
    assert model.generate(["a"], **OPTIONS)


def test_the_others_are_cancelled_where_one_fails(
    model: LFM2, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = NumPySampler.draw

    def poisoned(self: NumPySampler, logits: Any, rows: Any) -> Any:
        is_short = np.array([len(row.prompt) == 2 for row in rows])  # "a" and BOS
        return draw(self, np.where(is_short[:, None], np.nan, logits), rows)

    monkeypatch.setattr(NumPySampler, "draw", poisoned)
    with pytest.raises(Lfm2kitError, match="no token can be drawn at position 2"):
        model.generate(["hello", "a"], **OPTIONS)
    assert_nothing_is_held(writer_kept(model))


def test_a_model_without_a_tokenizer_is_one_line(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(Lfm2kitError, match=r"has no tokenizer\.json"):
        loaded(folder).generate("a")
    with pytest.raises(Lfm2kitError, match="no folder with a tokenizer"):
        build(small_spec()).generate("a")


def test_answers_have_tokens_ends_and_logprobs(model: LFM2) -> None:
    given = OPTIONS | {"logprobs": 2, "prompt_logprobs": 1}
    one, other, *_ = answers = model.answers(PROMPTS[:2], n=2, **given)
    assert [answer.text for answer in answers] == model.generate(PROMPTS[:2], n=2, **OPTIONS)
    tokenizer = language_of(model).tokenizer
    prompt = np.array(tokenizer.encode(PROMPTS[0]), np.int32)
    ids = np.concatenate([prompt, one.token_ids]).astype(np.int32)
    rows = np.arange(len(ids) - 1, dtype=np.int32)
    logits = model.logits(replace(Batch.of_sequences([ids]), logits_rows=rows))
    expected = [logprobs(row, id, 2) for row, id in zip(logits, ids[1:].tolist(), strict=True)]
    found = [(each.logprob, [*each.best]) for each in one.logprobs]
    assert found == expected[len(prompt) - 1 :]
    assert [each.token_id for each in one.logprobs] == one.token_ids
    assert [each.position for each in one.logprobs] == [*range(12)]
    of_prompt = [(each.logprob, [*each.best]) for each in one.prompt_logprobs]
    assert of_prompt == [(own, best[:1]) for own, best in expected[: len(prompt) - 1]]
    assert (one.end, other.prompt_logprobs, len(other.logprobs)) == ("length", [], 12)
    (alone,) = model.answers("hello", **OPTIONS)
    assert (alone.text, alone.logprobs) == (answers[2].text, [])


@pytest.mark.parametrize("option", ["logprobs", "prompt_logprobs"])
def test_text_alone_has_no_logprobs(model: LFM2, option: str) -> None:
    for prompt in ("a", ["a"]):
        with pytest.raises(Lfm2kitError, match=rf"{option}=3: .* call answers"):
            model.generate(prompt, **{option: 3})
    with pytest.raises(Lfm2kitError, match=r"call answers"):
        model.generate_async("a", **{option: 3})


def test_texts_obey_constraints_and_biases(model: LFM2) -> None:
    schema = {"enum": ["tea", "whales"]}
    for given in ({"json_schema": schema}, {"json_schema": json.dumps(schema)}):
        texts = model.generate(["a"], n=4, **OPTIONS, **given)
        assert {*texts} <= {'"tea"', '"whales"'}
    assert re.fullmatch("[0-9]{2}-[ab]", "".join(model.generate("a", regex="[0-9]{2}-[ab]")))
    assert model.generate(["a"], grammar='start: "x" "y"', **OPTIONS) == ["xy"]
    (answer,) = model.answers(HELLO, logit_bias={65: 1000.0}, **OPTIONS)
    assert answer.token_ids == [65] * 12


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"regex": "("}, "the regex cannot be used: unclosed group"),
        ({"json_schema": {"type": 5}}, "the JSON schema cannot be used: type must be"),
        ({"grammar": "begin: "}, "the grammar cannot be used"),
        ({"logit_bias": {423: 1.0}}, "logit_bias: token id 423 is outside the vocabulary of 423"),
    ],
)
def test_what_cannot_restrict_a_text_is_refused_when_it_is_given(
    model: LFM2, given: dict[str, Any], words: str
) -> None:
    with pytest.raises(Lfm2kitError, match=words):
        model.generate("a", **given)


def test_a_constraint_is_compiled_once(model: LFM2) -> None:
    language = language_of(model)
    options = Generation(regex="[0-4]{3}")
    one, other = (language.request(text, options, 0).constraint for text in ("a", "b"))
    assert one is other
