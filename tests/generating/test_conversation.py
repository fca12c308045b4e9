"""Chats of several turns: what is remembered, and what is computed again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lfm2kit.engine.engine import Engine
from lfm2kit.errors import Lfm2kitError
from lfm2kit.generating.answer import Answer
from lfm2kit.generating.conversation import Conversation, rejoined
from lfm2kit.generating.language import Language
from lfm2kit.generating.options import Generation
from lfm2kit.generating.writer import Writer
from lfm2kit.state import Room
from tests.chat.folders import golden_tokenizer
from tests.checkpoint.folders import change_json
from tests.generating.folders import loaded, model_folder

PAGE = Room(0).page_tokens
OPTIONS = Generation(chat=True, max_tokens=6, system="Be brief.")


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    folder = model_folder(tmp_path / "m")
    change_json(folder / "config.json", max_position_embeddings=1024)
    model = loaded(folder)
    return Writer(model, Language(folder, model.spec), context=1024, sequences=1)


def said(conversation: Conversation, writer: Writer, text: str) -> tuple[list[int], Answer]:
    """Return the ids of the prompt of a turn, and the answer."""
    request, answer = conversation.ask(text)
    while not answer.is_taken:
        writer.advance(answer)
    conversation.keep(text, request, answer)
    return request.ids.tolist(), answer


def shown(ids: list[int]) -> str:
    return golden_tokenizer().decode(ids, special=True)


def test_turns_are_remembered_until_a_reset(writer: Writer) -> None:
    conversation = Conversation(writer, OPTIONS, seed=1)
    first, answer = said(conversation, writer, "hello")
    second, _ = said(conversation, writer, "again")
    begin = "<|startoftext|><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    assert shown(first) == f"{begin}hello<|im_end|>\n<|im_start|>assistant\n"
    turn = f"{answer.text}<|im_end|>\n<|im_start|>user\nagain<|im_end|>\n<|im_start|>assistant\n"
    assert shown(second) == shown(first) + turn
    conversation.reset()
    assert said(conversation, writer, "hello")[0] == first


def test_the_next_turn_computes_only_what_is_new(
    writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    run = Engine._run

    def counted(self: Engine, chunks: Any) -> None:
        computed.append(sum(chunk.tokens for chunk in chunks))
        run(self, chunks)

    monkeypatch.setattr(Engine, "_run", counted)
    conversation = Conversation(writer, OPTIONS, seed=1)
    first, _ = said(conversation, writer, "hello " * 60)
    before = sum(computed)
    second, _ = said(conversation, writer, "again")
    assert before >= len(first) > 2 * PAGE
    assert sum(computed) - before < len(second) - len(first) + 6 + PAGE


def test_a_turn_that_is_refused_was_not_said(writer: Writer) -> None:
    conversation = Conversation(writer, OPTIONS, seed=1)
    said(conversation, writer, "hello")
    with pytest.raises(Lfm2kitError, match="a prompt may have up to"):
        conversation.ask("a " * 2000)
    assert shown(said(conversation, writer, "again")[0]).count("<|im_start|>user") == 2


def test_the_tokens_that_the_model_wrote_are_kept() -> None:
    tokenizer = golden_tokenizer()
    ids = tokenizer.encode("hello world, hello")
    letters = [tokenizer.encode(c, bos=False)[0] for c in "hello"]
    written = [ids[0], *letters]
    assert ids[: len(written)] != written
    joined = rejoined(tokenizer, written, ids)
    assert joined[: len(written)] == written
    assert tokenizer.decode(joined) == "hello world, hello"
    assert rejoined(tokenizer, [*written, *letters], ids) == ids
    assert rejoined(tokenizer, ids, ids) == ids
    assert rejoined(tokenizer, [], ids) == ids
