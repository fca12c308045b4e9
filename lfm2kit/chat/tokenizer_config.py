"""Reads what a folder says about its tokenizer beside tokenizer.json: named and added tokens."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as brief  # of what a file says, however long it is
from typing import Any

from lfm2kit.checkpoint.documents import read_json
from lfm2kit.errors import Lfm2kitError

CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"  # older transformers wrote the named tokens here
ADDED = "added_tokens_decoder"
NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True, slots=True)
class TokenizerConfig:
    """The fields of tokenizer_config.json, empty if the folder lacks that file."""

    path: Path
    fields: Mapping[str, Any]
    named: Mapping[str, str]  # the token that is called bos_token, and so on
    added: tuple[Mapping[str, Any], ...]  # content and flags of tokens, in the order of their ids

    def flag(self, name: str) -> bool | None:
        """Return a field that is true, false or absent."""
        value = self.fields.get(name)
        if value is None or isinstance(value, bool):
            return value
        raise Lfm2kitError(f"{self.path}: '{name}' is {brief(value)}; expected true or false")


def read_tokenizer_config(folder: Path) -> TokenizerConfig:
    """Return what the files of a model's folder say, as transformers reads them.

    Raise `Lfm2kitError` if a file cannot be read, a broken link included, or a field is not what it
    should be.
    """
    path, older = folder / CONFIG, folder / SPECIAL_TOKENS
    fields = read_json(path) if os.path.lexists(path) else {}
    if ADDED not in fields and os.path.lexists(older):
        fields |= read_json(older)
    named = {name: _content(path, name, value) for name in NAMES if (value := fields.get(name))}
    return TokenizerConfig(path, fields, named, _added(path, fields.get(ADDED, {})))


def _content(path: Path, name: str, value: Any) -> str:
    """Return the text of a token that is written as text, or as an object with its `content`."""
    content = value.get("content") if isinstance(value, dict) else value
    if isinstance(content, str) and content:
        return content
    raise Lfm2kitError(f"{path}: '{name}' is {brief(value)}; expected a token's text")


def _added(path: Path, tokens: Any) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(tokens, dict) or not all(map(_is_id, tokens)):
        raise Lfm2kitError(f"{path}: '{ADDED}' is {brief(tokens)}; expected tokens by their ids")
    in_order = sorted(tokens.items(), key=lambda item: int(item[0]))
    return tuple(_added_token(path, value) for _, value in in_order)


def _is_id(text: str) -> bool:
    return text.isdecimal() and len(text) < 10


def _added_token(path: Path, value: Any) -> Mapping[str, Any]:
    flags = {name: value[name] for name in FLAGS if isinstance(value, dict) and name in value}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise Lfm2kitError(f"{path}: '{ADDED}' has {brief(value)}; expected flags true or false")
    return {"content": _content(path, ADDED, value), **flags}
