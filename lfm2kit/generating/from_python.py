"""What `LFM2.generate` does: text as it comes, whole answers to several prompts, async text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import chain
from threading import Lock
from typing import Any

from lfm2kit.engine.requests import Request
from lfm2kit.errors import Lfm2kitError
from lfm2kit.generating.answer import Answer
from lfm2kit.generating.language import Language, Prompt
from lfm2kit.generating.options import Generation, drawn_seed, generation
from lfm2kit.generating.writer import Writer, written
from lfm2kit.model import LFM2

LANGUAGE, WRITER = "language", "writer"  # the names under which a model keeps them
_KEEPING = Lock()


def generate(model: LFM2, prompt: Any, given: dict[str, Any]) -> Iterator[str] | list[str]:
    """Return the text of one prompt piece by piece, or the whole answers to a list of prompts.

    See `LFM2.generate`.
    """
    options = _of_text_alone(given)
    if _is_one(prompt):
        return _pieces(model, _one_request(model, prompt, options), options)
    return [answer.text for answer in _whole(model, _prompts(prompt), options)]


def generate_async(model: LFM2, prompt: Any, given: dict[str, Any]) -> AsyncIterator[str]:
    """Return the text of one prompt piece by piece.  See `LFM2.generate_async`."""
    options = _of_text_alone(given)
    if not _is_one(prompt):
        raise Lfm2kitError("generate_async takes one prompt; for several, gather several tasks")
    return _async_pieces(model, _one_request(model, prompt, options), options)


def answers(model: LFM2, prompts: Any, given: dict[str, Any]) -> list[Answer]:
    """Return the whole answers to a prompt, or to a list of prompts.  See `LFM2.answers`."""
    return _whole(model, _prompts([prompts] if _is_one(prompts) else prompts), generation(given))


def _of_text_alone(given: dict[str, Any]) -> Generation:
    """Return the options; `Lfm2kitError` if they ask for more than text."""
    options = generation(given)
    if options.scores is not None:
        raise Lfm2kitError(options.scores, ": generate gives text alone; call answers([prompt])")
    return options


def _pieces(model: LFM2, request: Request, options: Generation) -> Iterator[str]:
    writer = writer_of(model, options)
    (answer,) = writer.begin(request, options)
    try:
        while not answer.is_taken:
            yield from _shown(writer, answer)
        answer.check()
    finally:
        writer.leave(answer)


async def _async_pieces(model: LFM2, request: Request, options: Generation) -> AsyncIterator[str]:
    writer = await asyncio.to_thread(writer_of, model, options)
    (answer,) = writer.begin(request, options)
    try:
        while not answer.is_taken:
            for piece in await asyncio.to_thread(_shown, writer, answer):
                yield piece
        answer.check()
    finally:
        writer.leave(answer)


def _shown(writer: Writer, answer: Answer) -> list[str]:
    return [part.text for part in writer.advance(answer)]


def _whole(model: LFM2, prompts: Sequence[Prompt], options: Generation) -> list[Answer]:
    language, seed = language_of(model), drawn_seed()
    requests = [language.request(prompt, options, seed) for prompt in prompts]
    writer = writer_of(model, options)
    found: list[list[Answer]] = [[] for _ in prompts]

    def begin(place: int) -> list[Answer]:
        found[place] = writer.begin(requests[place], options)
        return found[place]

    with closing(written(writer, range(len(requests)), begin)) as pairs:  # whatever fails
        for _, ended in pairs:
            for answer in ended:
                answer.check()
    return [*chain.from_iterable(found)]


def _one_request(model: LFM2, prompt: Prompt, options: Generation) -> Request:
    if options.n > 1:
        raise Lfm2kitError(f"n={options.n}: several answers come whole; give the prompt in a list")
    return language_of(model).request(prompt, options, drawn_seed())


def _is_one(prompt: Any) -> bool:
    """Return whether this is a text, or the messages of a chat, and not a list of such prompts."""
    return isinstance(prompt, str) or (
        isinstance(prompt, (list, tuple)) and any(isinstance(one, Mapping) for one in prompt)
    )


def _prompts(prompts: Any) -> Sequence[Prompt]:
    """Return a list of prompts; `Lfm2kitError` for anything else, in the list or in its place."""
    is_list = isinstance(prompts, (list, tuple))
    for one in prompts if is_list else [prompts]:
        if not is_list or not isinstance(one, (str, list, tuple)):
            wanted = "a text, a list of messages such as {'role': 'user', 'content': '...'}, or a"
            raise Lfm2kitError(f"a prompt is {wanted} list of these; got {type(one).__name__}")
    whole: Sequence[Prompt] = prompts
    return whole


def language_of(model: LFM2) -> Language:
    """Return the reader of the model's folder, which the model keeps."""
    with _KEEPING:
        if LANGUAGE not in model.kept:
            if model.folder is None:
                raise Lfm2kitError("this model has no folder with a tokenizer; use load_model")
            model.kept[LANGUAGE] = Language(model.folder, model.spec)
        language: Language = model.kept[LANGUAGE]
    return language


def writer_of(model: LFM2, options: Generation) -> Writer:
    """Return the writer that the model keeps, which finds the pages of earlier prompts again.

    Another room than before takes another one, which the model keeps instead.
    """
    language, asked = language_of(model), (options.context, options.sequences)
    if model.exchanges:
        raise Lfm2kitError("this rank has only a share of the experts; load the whole model")
    with _KEEPING:
        room, writer = model.kept.pop(WRITER, (None, None))
        if writer is None or asked not in (room, (None, None)):
            del writer  # its state makes room for the other one's
            writer = Writer(model, language, context=asked[0], sequences=asked[1])
            room = asked
        model.kept[WRITER] = room, writer
    made: Writer = writer
    return made
