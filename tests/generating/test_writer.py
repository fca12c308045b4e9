"""Answers: where they end, what is shown of them, and what is freed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lfm2kit.chat.streaming import TextStream
from lfm2kit.chat.thinking import TAGS, Thinking, begins_in_thought
from lfm2kit.engine.requests import CANCELLED, FAILED, LENGTH, STOP, Event
from lfm2kit.errors import Lfm2kitError
from lfm2kit.generating.answer import Answer
from lfm2kit.generating.language import Language
from lfm2kit.generating.options import Generation
from lfm2kit.generating.writer import MOST_BEGUN, Writer, written
from tests.chat.folders import folder_with, golden_tokenizer
from tests.generating.folders import loaded, model_folder

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 24}
SAMPLED: dict[str, Any] = {"seed": 1, "max_tokens": 24}


def writer_for(folder: Path, sequences: int = 4) -> Writer:
    model = loaded(folder)
    assert model.folder == folder
    return Writer(model, Language(folder, model.spec), context=128, sequences=sequences)


def begun(writer: Writer, prompt: str = "It is a truth", **options: Any) -> list[Answer]:
    asked = Generation(**options)
    return writer.begin(writer.language.request(prompt, asked, seed=0), asked)


def ended(writer: Writer, answers: list[Answer]) -> list[Answer]:
    for _ in range(1000):
        if all(answer.end is not None for answer in answers):
            return answers
        writer.step()
    raise AssertionError("not done after 1000 steps")


def answered(writer: Writer, prompt: str = "It is a truth", **options: Any) -> Answer:
    (answer,) = ended(writer, begun(writer, prompt, **options))
    return answer


def assert_nothing_is_held(writer: Writer) -> None:
    writer.step()
    assert not writer._engine.is_busy
    assert writer._engine._scheduler.pages.free == writer._engine.room.pages
    assert not writer._answers


def test_the_parts_that_are_taken_make_up_the_text(tmp_path: Path) -> None:
    writer = writer_for(model_folder(tmp_path))
    (answer,) = begun(writer, **SAMPLED)
    parts = []
    while not answer.is_taken:
        parts += writer.advance(answer)
    assert "".join(part.text for part in parts) == answer.text
    assert answer.text == golden_tokenizer().decode(answer.token_ids)
    assert (answer.end, len(answer.token_ids)) == (LENGTH, 24)
    assert_nothing_is_held(writer)


@pytest.mark.parametrize("by", ["generation_config.json", "the tokenizer"])
def test_an_end_id_ends_a_text_and_is_not_shown(by: str, tmp_path: Path) -> None:
    ids = answered(writer_for(model_folder(tmp_path)), **SAMPLED).token_ids
    place = next(i for i in range(4, 24) if ids[i] not in ids[:i])
    before = golden_tokenizer().decode(ids[:place])
    if by == "the tokenizer":
        folder_with(tmp_path, eos_token=golden_tokenizer().piece(ids[place]))
    else:
        model_folder(tmp_path, eos_token_id=[5, ids[place]])
    answer = answered(writer_for(tmp_path), **SAMPLED)
    assert (answer.text, answer.end) == (before, STOP)
    assert answer.token_ids == ids[: place + 1]
    least = answered(writer_for(tmp_path), **SAMPLED, min_tokens=24)
    assert (least.end, ids[place] in least.token_ids) == (LENGTH, False)


def test_a_stop_string_ends_its_choice_alone(tmp_path: Path) -> None:
    writer = writer_for(model_folder(tmp_path))
    plain = ended(writer, begun(writer, **SAMPLED, n=3))
    texts = [answer.text for answer in plain]
    assert len(set(texts)) == 3
    start = next(
        i for i in range(5, 20) if all(texts[1][i : i + 2] not in texts[c] for c in (0, 2))
    )
    stop = texts[1][start : start + 2]
    stopped = ended(writer, begun(writer, **SAMPLED, n=3, stop=[stop]))
    assert stopped[1].text == texts[1][: texts[1].index(stop)]
    assert [answer.text for answer in stopped][::2] == texts[::2]
    assert [answer.end for answer in stopped] == [LENGTH, STOP, LENGTH]
    assert len(stopped[1].token_ids) < 24
    assert_nothing_is_held(writer)


def test_a_stop_string_ends_a_text_that_the_model_may_not_end_yet(tmp_path: Path) -> None:
    writer = writer_for(model_folder(tmp_path))
    text = answered(writer, **SAMPLED, min_tokens=24).text
    stop = text[5:7]
    early = answered(writer, **SAMPLED, min_tokens=24, stop=[stop])
    assert (early.text, early.end) == (text[: text.index(stop)], STOP)


def test_an_answer_that_is_left_frees_its_pages_whenever_it_is_left(tmp_path: Path) -> None:
    writer = writer_for(model_folder(tmp_path))
    (kept,) = begun(writer, **SAMPLED)
    first, second = begun(writer, **SAMPLED, n=2)
    writer.leave(second)  # before it has begun
    writer.step()
    with writer._lock:  # as if another thread, or this one, were in the midst of a step
        writer.leave(first)
        assert first.key in writer._answers
    writer.leave(first)
    assert first.key not in writer._answers
    ended(writer, [kept])
    assert_nothing_is_held(writer)
    writer.leave(kept)
    assert kept.end == LENGTH


def test_an_answer_that_finds_no_room_fails_alone(tmp_path: Path) -> None:
    writer = writer_for(model_folder(tmp_path), sequences=1)
    (long,) = begun(writer, "a" * 140)
    (short,) = begun(writer, **SAMPLED)
    ended(writer, [long, short])
    assert (long.end, short.end) == (FAILED, LENGTH)
    with pytest.raises(Lfm2kitError, match="a prompt may have up to 127"):
        long.check()
    short.check()


def test_answers_come_when_they_end_and_more_begin_meanwhile(tmp_path: Path) -> None:
    writer = writer_for(model_folder(tmp_path))
    lengths = [1 + i % 3 for i in range(MOST_BEGUN + 5)]
    alone = answered(writer, temperature=0.0, max_tokens=3).token_ids

    def begin(place: int) -> list[Answer]:
        return begun(writer, temperature=0.0, max_tokens=lengths[place])

    pairs = list(written(writer, range(len(lengths)), begin))
    assert sorted(place for place, _ in pairs) == list(range(len(lengths)))
    assert all(a.token_ids == alone[: lengths[place]] for place, [a] in pairs)
    assert_nothing_is_held(writer)


def test_answers_come_that_end_in_the_steps_of_others(tmp_path: Path) -> None:
    writer = writer_for(model_folder(tmp_path), sequences=2)
    lengths = range(1, 9)
    pairs = written(writer, lengths, lambda n: begun(writer, max_tokens=n), writer.step)
    assert {n: len(answer.token_ids) for n, (answer,) in pairs} == {n: n for n in lengths}
    assert writer.ended == len(lengths)


def test_an_answer_that_ends_during_a_look_at_all_comes_with_the_next(tmp_path: Path) -> None:
    """Another thread may end it right after it was seen to go on."""
    writer = writer_for(model_folder(tmp_path), sequences=3)
    answers: list[Answer] = []

    class EndsOthers(list[Answer]):
        def __iter__(self) -> Iterator[Answer]:
            try:
                yield from super().__iter__()
            finally:
                if writer.ended:  # the look after the first end
                    ended(writer, answers)

    def begin(n: int) -> list[Answer]:
        answers.extend(begun(writer, max_tokens=n))
        return EndsOthers(answers[-1:])

    assert sorted(n for n, _ in written(writer, [9, 1, 8], begin)) == [1, 8, 9]


def test_answers_that_nobody_waits_for_are_left(tmp_path: Path) -> None:
    writer = writer_for(model_folder(tmp_path))
    pairs = written(writer, range(8), lambda place: begun(writer, max_tokens=1 + 20 * place))
    next(pairs)
    pairs.close()
    assert_nothing_is_held(writer)


def thinking_answer(text: str, begins: str = "", *, split: bool, hides: bool = False) -> Answer:
    """Return an answer that a model has written after a prompt that ends with `begins`."""
    tokenizer = golden_tokenizer()
    thinking = Thinking(begins_in_thought(begins)) if split else None
    answer = Answer(TextStream(tokenizer, special=TAGS), [7], thinking, hides=hides)
    for number in [*tokenizer.encode(text, special=True, bos=False), 7]:
        answer.add(Event(0, 0, number, end=STOP if number == 7 else None))
    return answer


@pytest.mark.parametrize(
    ("text", "begins", "thought", "shown"),
    [
        ("<think>so</think>yes", "", "so", "yes"),
        ("so</think>yes", "<think>\n", "so", "yes"),
        ("yes <thi", "", "", "yes <thi"),
        ("<think>so", "", "so", ""),
    ],
)
def test_thoughts_are_split_from_the_text(text: str, begins: str, thought: str, shown: str) -> None:
    answer = thinking_answer(text, begins, split=True)
    assert answer.text == text
    said = {True: "", False: ""}
    for part in answer.take():
        said[part.is_thought] += part.text
    assert said == {True: thought, False: shown}
    hidden = thinking_answer(text, begins, split=True, hides=True)
    assert (hidden.text, "".join(part.text for part in hidden.take())) == (shown, shown)
    plain = thinking_answer(text, begins, split=False)
    assert (plain.text, "".join(part.text for part in plain.take())) == (text, text)


def test_cancelling_is_not_an_error() -> None:
    answer = thinking_answer("a", split=False)
    answer.finish(CANCELLED)
    answer.check()
