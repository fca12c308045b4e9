"""What a model's folder says about text, and what is asked of an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lfm2kit.checkpoint.config import model_spec, parse_config
from lfm2kit.engine.room import most_tokens
from lfm2kit.engine.sampling import Sampling
from lfm2kit.errors import Lfm2kitError
from lfm2kit.generating.language import Language, Prompt
from lfm2kit.generating.options import Generation
from tests.chat.folders import folder_with, golden_tokenizer
from tests.generating.folders import CONFIG, model_folder

CONTEXT = CONFIG["max_position_embeddings"]
HELLO = [{"role": "user", "content": "hello"}]


def language_of(folder: Path, **config: Any) -> Language:
    return Language(folder, model_spec(parse_config(CONFIG | config), tied=True))


def test_the_checkpoint_says_what_is_not_asked_for(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, temperature=0.3, min_p=0.15, eos_token_id=[9, 7, 9])
    language = language_of(folder)
    request = language.request("hello", Generation(top_k=4), seed=5)
    assert request.sampling == Sampling(temperature=0.3, min_p=0.15, top_k=4, seed=5)
    assert request.stop_ids == (9, 7)
    assert request.ids.tolist() == golden_tokenizer().encode("hello")


def test_the_tokenizers_eos_ends_a_text_as_well(tmp_path: Path) -> None:
    assert language_of(model_folder(tmp_path, eos_token_id=3)).end_ids == (3, 7)
    assert language_of(model_folder(tmp_path)).end_ids == (7,)
    folder_with(tmp_path, eos_token=None)
    assert language_of(tmp_path).end_ids == ()


@pytest.mark.parametrize("prompt", ["hello", HELLO])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_chat_is_what_the_template_writes(
    prompt: Prompt, system: str | None, tmp_path: Path
) -> None:
    language = language_of(model_folder(tmp_path))
    request = language.request(prompt, Generation(chat=True, system=system), seed=0)
    begin = "" if system is None else "<|im_start|>system\nBe brief.<|im_end|>\n"
    whole = f"<|startoftext|>{begin}<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert language.tokenizer.decode(request.ids.tolist(), special=True) == whole
    assert request.max_tokens is None


def test_special_tokens_are_tokens_where_they_are_asked_for(tmp_path: Path) -> None:
    language = language_of(model_folder(tmp_path))
    assert 7 not in language.request("a<|im_end|>", Generation(), seed=0).ids
    assert 7 in language.request("a<|im_end|>", Generation(special=True), seed=0).ids


@pytest.mark.parametrize(
    ("options", "most"),
    [
        (Generation(), CONTEXT - 3),
        (Generation(context=20), 17),
        (Generation(max_tokens=9, context=20), 9),
    ],
)
def test_a_text_is_as_long_as_asked_or_as_the_context_leaves(
    options: Generation, most: int, tmp_path: Path
) -> None:
    language = language_of(model_folder(tmp_path))
    context = options.context or language.context

    def tokens_after(options: Generation, context: int) -> int:
        request = language.request("ab", options, seed=0)
        assert len(request.ids) == 3
        return most_tokens(request, context) - 3

    assert tokens_after(options, context) == most
    language = language_of(tmp_path, max_position_embeddings=4096)
    assert tokens_after(Generation(), 4096) == 256
    assert tokens_after(Generation(min_tokens=300), 4096) == 300


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ("", Generation(), "the prompt is empty; give some text"),
        ("", Generation(chat=True), "the prompt is empty"),
        ([], Generation(), "a chat needs at least one message"),
        ("a" * 300, Generation(), "a prompt may have up to 255"),
        (HELLO * 40, Generation(), "a prompt may have up to 255"),
        ("ab", Generation(max_tokens=254), "max_tokens may be up to 253"),
        ("ab", Generation(max_tokens=18, context=20), "max_tokens may be up to 17"),
        ("ab", Generation(max_tokens=18, context=20), r"may have \(context=20\)"),
        ("ab", Generation(max_tokens=254, context=256), r"may have \(the model's context\)"),
        ("ab", Generation(system="x"), "system='x': is of a chat; add chat=True"),
        (
            [{"role": "system", "content": "y"}, *HELLO],
            Generation(system="x"),
            "the chat has a system message already",
        ),
        (["text"], Generation(), "a message is 'text'"),
    ],
)
def test_a_prompt_that_cannot_be_answered_is_refused(
    prompt: Prompt, options: Generation, words: str, tmp_path: Path
) -> None:
    language = language_of(model_folder(tmp_path))
    with pytest.raises(Lfm2kitError, match=words):
        language.request(prompt, options, seed=0)


def test_a_folder_that_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, eos_token_id=500)
    with pytest.raises(Lfm2kitError, match="eos_token_id 500 is outside the vocabulary of 423"):
        language_of(folder)
    with pytest.raises(Lfm2kitError, match="this is another model's tokenizer"):
        language_of(folder, vocab_size=100)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(Lfm2kitError, match=r"has no tokenizer\.json"):
        language_of(folder)


def test_a_model_without_a_template_still_continues_text(tmp_path: Path) -> None:
    language = language_of(model_folder(tmp_path, template=None))
    assert language.request("hello", Generation(), seed=0).n == 1
    with pytest.raises(Lfm2kitError, match="has no chat template"):
        language.request(HELLO, Generation(), seed=0)
