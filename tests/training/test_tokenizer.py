"""The tokenizer, where `tokenizers` is installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("tokenizers", reason="tokenizers is not installed")

from training import prepare
from training.recipe import CONFIG
from training.texts import Text
from training.tokenizer import BOS, END_OF_TEXT, END_OF_TURN, PAD, SPECIAL, train_tokenizer

TEXTS = ["It is a truth universally acknowledged, that a single man", "in want of a wife."] * 9


def test_special_tokens_have_the_ids_of_lfm2() -> None:
    tokenizer = train_tokenizer(TEXTS)
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    assert list(ids.values()) == list(range(14))
    assert (ids["<|pad|>"], ids["<|startoftext|>"], ids["<|endoftext|>"]) == (0, 1, 2)
    assert (ids["<|im_start|>"], ids["<|im_end|>"]) == (6, 7)
    assert (CONFIG["pad_token_id"], CONFIG["bos_token_id"]) == (PAD, BOS)
    assert CONFIG["eos_token_id"] == END_OF_TURN
    assert prepare.GENERATION["eos_token_id"] == [END_OF_TURN, END_OF_TEXT]


@pytest.mark.parametrize("text", ["It is naïve -- £5", "a\n\n b\t c  ", "日本 \N{GRINNING FACE}"])
def test_any_text_comes_back_after_one_bos(text: str) -> None:
    tokenizer = train_tokenizer(TEXTS)
    ids = tokenizer.encode(text).ids
    assert ids[0] == BOS
    assert ids.count(BOS) == 1
    assert tokenizer.decode(ids) == text


def test_a_part_is_the_ids_of_the_whole_text_and_where_paragraphs_begin() -> None:
    tokenizer = train_tokenizer(TEXTS)
    part = prepare.part_of_texts(
        tokenizer, [Text("a", ("It is.", '"A man?"')), Text("b", ("A wife.",))]
    )
    whole = 'It is.\n\n"A man?"<|endoftext|>A wife.<|endoftext|>'
    assert part.ids.tolist() == tokenizer.encode(whole, add_special_tokens=False).ids
    assert len(part.starts) == 3
    assert tokenizer.decode(part.ids[part.starts[1] :]).startswith('"A man?"A wife.')
    assert part.nbytes == len('It is.\n\n"A man?"A wife.')


def test_the_chat_template_renders_what_turns_are_made_of(tmp_path: Path) -> None:
    from training.texts import turns
    from training.tokenizer import CHAT_TEMPLATE

    jinja2 = pytest.importorskip("jinja2", reason="jinja2 is not installed")
    book = Text("a", ("one", "two", "three", "four"))
    roles = ("user", "assistant") * 2
    messages = [{"role": r, "content": p} for r, p in zip(roles, book.paragraphs, strict=True)]
    template = jinja2.Environment().from_string(CHAT_TEMPLATE)
    assert template.render(messages=messages, bos_token="") == turns([book])[0]
    assert json.dumps(CHAT_TEMPLATE)
