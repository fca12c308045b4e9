"""Reads a file of prompts: a JSON object in each line, with options of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from lfm2kit import bounds
from lfm2kit.checkpoint.documents import parse_json, read_bounded
from lfm2kit.engine.requests import Request
from lfm2kit.engine.room import wanted_tokens
from lfm2kit.errors import Lfm2kitError, choices
from lfm2kit.generating.language import Language, Prompt
from lfm2kit.generating.options import CONSTRAINTS, OF_ALL, Generation

PROMPT, MESSAGES = PROMPTS = "prompt", "messages"
MOST_DIGITS = 20  # of a token id
NOWHERE = Path("a line")  # whoever shows an error about a line says which it is
OPTIONS = [one.name for one in fields(Generation) if one.name not in OF_ALL]


class Asked(NamedTuple):
    """A line of the file, and what it asks for."""

    number: int  # of the line, from 1
    request: Request
    options: Generation
    key: str  # which an answer has to exactly this


class Broken(NamedTuple):
    """A line that asks for nothing that can be done."""

    number: int
    why: str


def read_prompts(
    path: Path, language: Language, options: Generation, seed: int, model: str
) -> list[Asked | Broken]:
    """Return what the lines of a file ask for; blank ones are passed over.

    A line's options come before `options`.  `seed` is for lines that have none, and `model` says
    in words what answers.  Raise `Lfm2kitError` if the file cannot be read, or has no prompt.
    """
    lines = read_bounded(path, bounds.PROMPTS).split(b"\n")
    asked = [
        _asked(number, line, language, options, seed, model)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not asked:
        raise Lfm2kitError(f"{path}: there is no prompt in it")
    return asked


def _asked(
    number: int, line: bytes, language: Language, options: Generation, seed: int, model: str
) -> Asked | Broken:
    try:
        prompt, given = _read(parse_json(NOWHERE, line))
        own = replace(options, **_alone(given))
        _check_system(prompt, own)
        request = language.request(prompt, own, seed)
    except Lfm2kitError as error:
        return Broken(number, str(error).removeprefix(f"{NOWHERE}: "))
    return Asked(number, request, own, _key(model, request, own))


def _read(fields: Mapping[str, Any]) -> tuple[Prompt, dict[str, Any]]:
    """Return a line's prompt and its options."""
    given = dict(fields)
    prompts = [given.pop(name) for name in PROMPTS if name in given]
    if len(prompts) != 1:
        raise Lfm2kitError(f"expected '{PROMPT}' or '{MESSAGES}', and one of them alone")
    for name in given:
        if name not in OPTIONS:
            raise Lfm2kitError(f"unknown option '{name:.80}'; {choices(name, OPTIONS)}")
    kind = str if PROMPT in fields else list
    if not isinstance(prompts[0], kind):
        expected = "a text" if kind is str else "a list of messages"
        raise Lfm2kitError(f"'{PROMPT if kind is str else MESSAGES}' is not {expected}")
    if isinstance(biases := given.get("logit_bias"), dict):
        given["logit_bias"] = {_id_in(key): bias for key, bias in biases.items()}
    return prompts[0], given


def _alone(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line's options, of which a constraint replaces one of another kind."""
    has_own = any(name in given for name in CONSTRAINTS)
    return {**(dict.fromkeys(CONSTRAINTS) if has_own else {}), **given}


def _id_in(key: str) -> int | str:
    """Return the token id that a key of JSON, which is always a text, stands for."""
    is_number = key.isascii() and key.isdecimal() and len(key) < MOST_DIGITS
    return int(key) if is_number else key


def _check_system(prompt: Prompt, options: Generation) -> None:
    """Raise `Lfm2kitError` for a system message without a chat; a line cannot have `chat`."""
    if options.system is not None and isinstance(prompt, str) and not options.chat:
        raise Lfm2kitError(
            f"a system message belongs to a chat; give '{MESSAGES}' instead of the prompt"
        )


def _key(model: str, request: Request, options: Generation) -> str:
    """Return a hash of all that the answer depends on; a seed counts if somebody asked for it."""
    said = [
        model,
        request.ids.tolist(),
        asdict(request.sampling) | {"seed": options.seed},
        [wanted_tokens(request), request.min_tokens, request.stop_ids, request.n],
        [options.stop, options.think, options.logprobs, options.prompt_logprobs],
        options.constraint,
    ]
    return sha256(json.dumps(said).encode()).hexdigest()[:32]
