"""A chat of several turns, in which each turn computes only what is new."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lfm2kit.chat.tokenizer import Tokenizer
from lfm2kit.engine.requests import Request
from lfm2kit.generating.answer import Answer
from lfm2kit.generating.options import Generation
from lfm2kit.generating.writer import Writer


class Conversation:
    """What a user and a model have said, and who writes the answers."""

    def __init__(self, writer: Writer, options: Generation, seed: int) -> None:
        self.options = options  # the system message is one of them
        self._writer = writer
        self._seed = seed
        self.reset()

    def reset(self) -> None:
        """Forget what was said, but for the system message."""
        self._said: list[dict[str, Any]] = []
        self._ids: list[int] = []  # of all that was said, as it was computed

    @property
    def has_begun(self) -> bool:
        """Return whether something was said that is remembered."""
        return bool(self._said)

    def ask(self, text: str, *, split: bool = False) -> tuple[Request, Answer]:
        """Return the request and the answer to what a user says, which is still to be written.

        Raise `Lfm2kitError` if the chat is too long for the model's context, or the template
        refuses it; then nothing was said.
        """
        messages = [*self._said, _message("user", text)]
        request = self._writer.language.request(messages, self.options, self._seed)
        ids = rejoined(self._writer.language.tokenizer, self._ids, request.ids.tolist())
        request = replace(request, prompt=ids)
        (answer,) = self._writer.begin(request, self.options, split=split)
        return request, answer

    def keep(self, text: str, request: Request, answer: Answer) -> None:
        """Remember a turn, whose answer may have been cut off."""
        self._writer.leave(answer)
        self._said += [_message("user", text), _message("assistant", answer.text)]
        self._ids = [*request.ids.tolist(), *answer.token_ids]


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def rejoined(tokenizer: Tokenizer, before: list[int], ids: list[int]) -> list[int]:
    """Return the ids of a chat with those that a model wrote, where `ids` has the same text.

    A tokenizer may cut a text into other tokens than the model did.  The pages of a chat are found
    by their tokens, so those `before` are taken as long as the new text begins with theirs.
    """
    if not tokenizer.is_byte_level:
        return ids
    begun = b"".join(map(tokenizer.token_bytes, before))
    length = place = 0
    while length < len(begun) and place < len(ids):
        length += len(tokenizer.token_bytes(ids[place]))
        place += 1
    is_same = b"".join(map(tokenizer.token_bytes, ids[:place])) == begun
    return [*before, *ids[place:]] if is_same and place < len(ids) else ids
