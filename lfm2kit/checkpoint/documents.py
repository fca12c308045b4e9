"""Reads JSON and TOML from regular files of bounded size, in which no key comes twice.

An error about a file is one line that begins with its path.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from codecs import BOM_UTF8
from pathlib import Path
from typing import Any

from lfm2kit import bounds
from lfm2kit.checkpoint.file_kinds import check_file
from lfm2kit.errors import Lfm2kitError

# The lookbehind, and the bound of a quoted part, keep the time in proportion to the text's length.
_PART = rb"""(?:"(?:[^"\\\n]|\\.){0,300}"|'[^'\n]{0,300}'|(?<![\w-])[\w-]+)[ \t]*\.[ \t]*"""
LONG_KEY = re.compile(rb"(?:%b){%d}" % (_PART, bounds.PARTS))


def read_json(path: Path) -> dict[str, Any]:
    """Return the fields of a JSON file; raise `Lfm2kitError` if it cannot be read as one."""
    return parse_json(path, read_bounded(path, bounds.JSON))


def read_toml(path: Path) -> dict[str, Any]:
    """Return the table of a TOML file; raise `Lfm2kitError` if it cannot be read as one."""
    text = read_bounded(path, bounds.TOML)
    if LONG_KEY.search(text):  # the parser's memory grows with the square of the parts
        raise Lfm2kitError(f"{path}: a key has more than {bounds.PARTS} parts between dots")
    try:
        table = tomllib.loads(_decoded(text))
        _check_depth(table, bounds.NESTED)
    except (ValueError, RecursionError) as error:
        raise Lfm2kitError(f"{path}: not a readable TOML file: {error}") from None
    return table


def read_text(path: Path, most: int) -> str:
    """Return a file's text; raise `Lfm2kitError` if it is not UTF-8, or has over `most` bytes."""
    try:
        return _decoded(read_bounded(path, most))
    except UnicodeDecodeError as error:
        raise Lfm2kitError(f"{path}: not UTF-8: {error}") from None
    except ValueError as error:
        raise Lfm2kitError(f"{path}: {error}") from None


def read_bounded(path: Path, most: int) -> bytes:
    """Return the bytes of a text file; raise `Lfm2kitError` if it has more than `most`."""
    size = check_file(path, is_text=True)
    if size > most:
        raise Lfm2kitError(f"{path}: {size} bytes; lfm2kit reads up to {most} of such a file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise Lfm2kitError(f"{path}: {error.strerror}") from None


def parse_json(path: Path, text: bytes) -> dict[str, Any]:
    """Return the fields of `text`, a JSON object from the file `path`.

    Raise `Lfm2kitError` for anything else.  Python's own reader accepts NaN, a key that comes
    twice, and 1e999 as infinity; here each of these is an error.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for key, value in pairs:
            if key in fields:
                raise Lfm2kitError(f"{path}: the JSON has '{key}' twice; keep the right one")
            fields[key] = value
        return fields

    try:
        fields = json.loads(
            _decoded(text),
            object_pairs_hook=unique,
            parse_constant=_refused,
            parse_float=_finite,
            parse_int=_whole,
        )
        _check_depth(fields, bounds.NESTED)
    except (ValueError, RecursionError) as error:
        raise Lfm2kitError(f"{path}: not readable JSON: {error}") from None
    if not isinstance(fields, dict):
        raise Lfm2kitError(f"{path}: expected a JSON object, found a {type(fields).__name__}")
    return fields


def _decoded(text: bytes) -> str:
    if text.startswith(BOM_UTF8):
        raise ValueError("a byte order mark comes first; save it as UTF-8 without one")
    return text.decode("utf-8")


def _refused(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:40]} is beyond the largest float")
    return value


def _whole(text: str) -> int | float:
    """Read -0 as a float, because no whole number is negative zero."""
    if len(text) > bounds.DIGITS:
        raise ValueError(f"a number has {len(text)} digits; lfm2kit reads up to {bounds.DIGITS}")
    return -0.0 if text == "-0" else int(text)


def _check_depth(value: Any, left: int) -> None:
    """Refuse values nested so deep that comparing or printing them would fail."""
    if isinstance(value, (dict, list)):
        if left == 0:
            raise ValueError(f"it is nested more than {bounds.NESTED} deep")
        for item in value.values() if isinstance(value, dict) else value:
            _check_depth(item, left - 1)
