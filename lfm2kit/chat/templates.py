"""Chat templates: messages to the text of a prompt, in the environment of Hugging Face's templates.

A template is a program that comes with a model.  The sandbox keeps it from Python's objects and
from changing messages, and ends one that loops for ever, but not one that asks for all memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from reprlib import repr as brief  # of what a file says, however long it is
from typing import Any

from lfm2kit import bounds
from lfm2kit.chat.optional import library
from lfm2kit.chat.tokenizer_config import TokenizerConfig
from lfm2kit.checkpoint.companions import TEMPLATES
from lfm2kit.checkpoint.documents import read_bounded
from lfm2kit.errors import Lfm2kitError

FILE = "chat_template.jinja"
FIELD = "chat_template"  # of tokenizer_config.json
DEFAULT, FOR_TOOLS = "default", "tool_use"  # the names that are chosen unasked
Message = Mapping[str, Any]


class ChatTemplate:
    """A model's chat templates, usually one; `load_template` makes it."""

    def __init__(self, path: Path, templates: Mapping[str, str], named: Mapping[str, str]) -> None:
        self.path = path
        self._templates = templates
        self._named = named  # special tokens
        self._compiled: dict[str, Any] = {}

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        *,
        add_generation_prompt: bool = True,
        which: str | None = None,
        now: Callable[[], datetime] = datetime.now,
        **variables: Any,
    ) -> str:
        """Return the text of a chat, BOS included if the template writes it.

        `variables` are what this template knows beside the usual ones, `preserve_thinking` for
        example, and `which` names one of several templates.  Raise `Lfm2kitError` if the template
        refuses the messages or fails.
        """
        check_chat(messages, tools)
        chosen = self._chosen(which, has_tools=tools is not None)
        usual = {"messages": messages, "tools": tools, "documents": None, **self._named}
        with_clock = {"strftime_now": lambda format: now().strftime(format)}
        prompt = {"add_generation_prompt": add_generation_prompt}
        try:
            template = self._compile(chosen)
            from lfm2kit.chat.sandbox import bounded  # here: it needs jinja2

            with bounded():
                text: str = template.render({**with_clock, **usual, **prompt, **variables})
        except Exception as error:  # a template's mistakes raise anything
            raise Lfm2kitError(f"{self.path}: {_explained(error)}") from None
        return text

    def _chosen(self, which: str | None, *, has_tools: bool) -> str:
        wanted = [which] if which else [FOR_TOOLS, DEFAULT] if has_tools else [DEFAULT]
        for one in wanted:
            if one in self._templates:
                return one
        there = ", ".join(sorted(self._templates))
        raise Lfm2kitError(f"{self.path}: no chat template '{wanted[-1]}'; available: {there}")

    def _compile(self, name: str) -> Any:
        if name not in self._compiled:
            self._compiled[name] = environment().from_string(self._templates[name])
        return self._compiled[name]


def load_template(folder: Path, config: TokenizerConfig) -> ChatTemplate:
    """Return the chat template of a model's folder; files come before tokenizer_config.json.

    Raise `Lfm2kitError` if there is none, if it cannot be read, or if `jinja2` is missing.
    """
    library("jinja2")
    files = _files(folder)
    texts = {name: _text(path) for name, path in files.items()}
    path = next(iter(files.values()), config.path)
    templates = texts or _configured(config)
    if not templates:
        raise Lfm2kitError(
            f"{folder} has no chat template, neither {FILE} nor '{FIELD}' in {config.path.name}; "
            "this may be a base model, which continues text"
        )
    return ChatTemplate(path, templates, config.named)


def _files(folder: Path) -> dict[str, Path]:
    # A broken link is an error: another template would give another prompt.
    default = {DEFAULT: folder / FILE} if os.path.lexists(folder / FILE) else {}
    others = sorted((folder / TEMPLATES).glob("*.jinja"))
    return {**default, **{path.stem: path for path in others}}


def _text(path: Path) -> str:
    try:
        return read_bounded(path, bounds.TEMPLATE).decode()
    except UnicodeDecodeError as error:
        raise Lfm2kitError(f"{path}: not UTF-8 at byte {error.start}") from None


def _configured(config: TokenizerConfig) -> dict[str, str]:
    """Return the templates in tokenizer_config.json: one, or a list of named ones."""
    said = config.fields.get(FIELD)
    if said is None:
        return {}
    listed = [{"name": DEFAULT, "template": said}] if isinstance(said, str) else said
    try:
        templates = {each["name"]: each["template"] for each in listed}
        if all(isinstance(text, str) for text in (*templates, *templates.values())):
            return templates
    except (TypeError, KeyError):
        pass
    raise Lfm2kitError(
        f"{config.path}: '{FIELD}' is {brief(said)}; expected a template, or a list of objects "
        "with 'name' and 'template'"
    )


def check_chat(messages: Sequence[Message], tools: Sequence[Any] | None) -> None:
    """Raise `Lfm2kitError` unless there are messages with a role, and all is JSON."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise Lfm2kitError("a chat needs at least one message: {'role': 'user', 'content': '...'}")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise Lfm2kitError(f"a message is {brief(message)}; expected a dict with a 'role'")
    try:
        json.dumps([messages, tools])
    except (TypeError, ValueError, RecursionError) as error:
        raise Lfm2kitError(f"messages and tools must be JSON values: {error}") from None


def environment() -> Any:
    """Return a Jinja environment like that of transformers' `apply_chat_template`."""
    from lfm2kit.chat.generation_tag import Generation
    from lfm2kit.chat.sandbox import Sandbox

    extensions = [library("jinja2.ext").loopcontrols, Generation]
    made = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _refuse
    return made


class RefusalError(Exception):
    """The reason for which a template does not accept messages, in its own words."""


def _refuse(reason: str) -> None:
    raise RefusalError(reason)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as it is; Jinja's own filter escapes what HTML would interpret."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _explained(error: Exception) -> str:
    if isinstance(error, RefusalError):
        return f"the chat template refuses these messages: {error}"
    line = getattr(error, "lineno", None)  # of a syntax error
    place = f" at line {line}" if line else ""
    return f"the chat template fails{place}: {type(error).__name__}: {error}"
