"""Chats to token ids: what a template writes, with users' text kept apart from its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lfm2kit.chat.templates import ChatTemplate, Message, check_chat
from lfm2kit.chat.tokenizer import Tokenizer


def chat_ids(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Sequence[Any] | None = None,
    *,
    special: bool = False,
    **options: Any,
) -> list[int]:
    """Return the ids of a chat; `options` are those of `ChatTemplate.render`.

    Special tokens in the text of users, systems and tools are text unless `special` is true.  Those
    in the model's own messages are tokens, because the model wrote them.
    """
    check_chat(messages, tools)
    mark = ""
    if not special:
        messages, tools, mark = tokenizer.plain_text.marked(messages, tools)
    text = template.render(messages, tools, **options)
    if not mark:  # in one piece, as transformers does
        return tokenizer.encode(text, special=True, bos=False)
    return tokenizer.encode_parts(tokenizer.plain_text.parts(text, mark))
