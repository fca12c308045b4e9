"""What a model's folder says about text: its tokenizer, its template, its defaults and its ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from lfm2kit import specs
from lfm2kit.chat.guided import Guide
from lfm2kit.chat.prompts import chat_ids
from lfm2kit.chat.streaming import TextStream
from lfm2kit.chat.templates import ChatTemplate, Message, load_template
from lfm2kit.chat.thinking import TAGS, Thinking, begins_in_thought
from lfm2kit.chat.tokenizer import load_tokenizer
from lfm2kit.engine.constraints import Constraint
from lfm2kit.engine.generation_config import NAME, read_generation_config
from lfm2kit.engine.guesses import SPECULATIONS
from lfm2kit.engine.requests import Request
from lfm2kit.engine.room import MODELS, check_context, context_of, most_tokens
from lfm2kit.errors import Lfm2kitError, Option
from lfm2kit.generating.options import MOST_TOKENS, Generation

Prompt = str | Sequence[Message]  # a text, or the messages of a chat
MOST_CONSTRAINTS = 64  # that are kept compiled
SHORTEST = "?"  # what a user may say
LAST = 16  # tokens of a prompt, among which an opening tag of a thought may end it


class Language:
    """A reader of prompts and answers for the model in `folder`.

    Raise `Lfm2kitError` if there is no tokenizer, if it is another model's, or if a file is wrong.
    """

    def __init__(self, folder: Path, spec: specs.Model) -> None:
        self._vocab_size = vocab_size = spec.embed_tokens.vocab_size
        self.folder = folder
        self.context = context_of(spec)
        self.tokenizer = load_tokenizer(folder)
        self.tokenizer.check_fits(vocab_size)
        self._sampling, eos_ids = read_generation_config(folder)
        for id in eos_ids:
            if id >= vocab_size:
                said = f"eos_token_id {id} is outside the vocabulary of {vocab_size}"
                raise Lfm2kitError(f"{folder / NAME}: {said}")
        eos = self.tokenizer.id_of("eos_token")
        self._compiled = lru_cache(MOST_CONSTRAINTS)(self._compile)
        own = () if eos is None else (eos,)
        self.end_ids = tuple(dict.fromkeys((*eos_ids, *own)))  # each of them ends a text

    @cached_property
    def guide(self) -> Guide:
        return Guide(self.tokenizer)

    @cached_property
    def template(self) -> ChatTemplate:
        return load_template(self.folder, self.tokenizer.config)

    def request(self, prompt: Prompt, options: Generation, seed: int) -> Request:
        """Return what to ask of an engine; `seed` counts where the options have none.

        Raise `Lfm2kitError` for an empty prompt, one that is too long for the model or for the
        options' context, and a chat that the template refuses.
        """
        ids = self._ids(prompt, options)
        context = min(self.context, options.context or self.context)
        is_chat = options.chat or not isinstance(prompt, str)
        request = Request(
            ids,
            options.sampling(self._sampling, seed),
            max_tokens=options.max_tokens,
            usual_tokens=None if is_chat else MOST_TOKENS,
            min_tokens=options.min_tokens,
            stop_ids=self.end_ids,
            n=options.n,
            logprobs=options.logprobs,
            prompt_logprobs=options.prompt_logprobs,
            guesses=None if options.speculate is None else SPECULATIONS[options.speculate],
            constraint=self._constraint_of(options),
        )
        request.sampling.check_ids(self._vocab_size)
        is_whole = context == self.context
        most_tokens(request, context, MODELS if is_whole else Option("context", context))
        return request

    def check(self, options: Generation) -> None:
        """Raise `Lfm2kitError` for a context, a constraint or a bias that no prompt can have."""
        check_context(options.context, self.context)
        self._constraint_of(options)
        options.sampling(self._sampling).check_ids(self._vocab_size)

    def check_chat(self, options: Generation) -> None:
        """Raise `Lfm2kitError` if not even the shortest message can be answered with these."""
        self.request([{"role": "user", "content": SHORTEST}], options, 0)

    def stream(self, options: Generation) -> TextStream:
        """Return a new stream for an answer, whose text has the tags of thoughts."""
        return TextStream(self.tokenizer, options.stop or (), special=TAGS)

    def thinking(self, request: Request) -> Thinking:
        """Return a new splitter for an answer to a prompt, which may have begun a thought."""
        end = self.tokenizer.decode(request.ids[-LAST:].tolist(), special=True)
        return Thinking(begins_in_thought(end))

    def _constraint_of(self, options: Generation) -> Constraint | None:
        return None if options.constraint is None else self._compiled(*options.constraint)

    def _compile(self, kind: str, text: str) -> Constraint:
        """Return the constraint that `Guide` makes of a text by its method `kind`."""
        made: Constraint = getattr(self.guide, kind)(text)
        return made

    def _ids(self, prompt: Prompt, options: Generation) -> list[int]:
        if isinstance(prompt, str) and not prompt:
            raise Lfm2kitError("the prompt is empty; give some text")
        if isinstance(prompt, str) and not options.chat:
            if options.system is not None:
                needs = ": is of a chat; add ", Option("chat", True)
                raise Lfm2kitError(Option("system", options.system), *needs)
            return self.tokenizer.encode(prompt, special=options.special)
        messages = _messages(prompt, options.system)
        return chat_ids(self.tokenizer, self.template, messages, special=options.special)


def _messages(prompt: Prompt, system: str | None) -> list[Any]:
    """Return the messages of a chat, a system message before them if one is asked for."""
    said = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
    if system is None:
        return said
    if said and isinstance(said[0], Mapping) and said[0].get("role") == "system":
        raise Lfm2kitError(Option("system", system), ": the chat has a system message already")
    return [{"role": "system", "content": system}, *said]
