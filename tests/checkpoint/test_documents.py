"""JSON and TOML files: what Python's own readers let pass, or fail on with errors of their own."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lfm2kit import bounds
from lfm2kit.building.plan import Plan
from lfm2kit.checkpoint.config import read_config
from lfm2kit.checkpoint.documents import read_json, read_toml
from lfm2kit.checkpoint.spec_files import read_spec
from lfm2kit.errors import Lfm2kitError

Reader = Callable[[Path], Any]
READERS: dict[str, Reader] = {
    "config.json": read_config,
    "model.toml": read_spec,
    "plan.toml": Plan.read,
}


def refused(read: Reader, path: Path, *words: str) -> None:
    with pytest.raises(Lfm2kitError) as caught:
        read(path)
    for word in [str(path), *words]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('{"a": 1, "a": 1}', "'a' twice"),
        ('{"b": [{"a": 1, "a": 2}]}', "'a' twice"),
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "-Infinity"),
        ('{"a": 1e999}', "1e999"),
        ('{"a": ' + "9" * 4301 + "}", "digits"),
        ("[" * 100_000, "JSON"),
        ("[1]", "list"),
        ("", "the file is empty"),
        ("\ufeff{}", "JSON: a byte order mark comes first; save it as UTF-8 without one"),
    ],
)
def test_json_is_refused_where_python_would_guess_or_fail(
    tmp_path: Path, text: str, word: str
) -> None:
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    refused(read_json, path, word)


@pytest.mark.parametrize(
    "text",
    ["a = " + "9" * 4301, "a = " + "[" * 3000, "a = 1\na = 2", "a = 'b", "[a.b]\n[a]\nb.c = 1"],
)
def test_toml_is_refused_where_python_fails(tmp_path: Path, text: str) -> None:
    path = tmp_path / "model.toml"
    path.write_text(text)
    refused(read_toml, path, "TOML")


def test_text_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b'{"a": "\xff"}')
    refused(read_json, path, "utf-8")
    refused(read_toml, path, "utf-8")


def test_a_file_beyond_its_bound_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with open(path, "wb") as file:
        file.truncate(bounds.JSON + 1)  # a hole: no bytes on the disk
    refused(read_json, path, str(bounds.JSON + 1))
    refused(read_toml, path, str(bounds.TOML))


@pytest.mark.timeout(20)  # a reader that opens a pipe waits for ever
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, name: str) -> None:
    read, path = READERS[name], tmp_path / name
    os.mkfifo(path)
    refused(read, path, "pipe")
    path.unlink()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(path))  # a socket's path may have 107 bytes
        refused(read, path, "socket")
    path.unlink()
    path.mkdir()
    refused(read, path, "directory")
    path.rmdir()
    path.symlink_to("/dev/zero")
    refused(read, path, "device")
    path.unlink()
    path.symlink_to("nowhere")
    refused(read, path, "link to nowhere")
    path.unlink()
    refused(read, path, "No such file")


def test_a_byte_order_mark_before_toml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.toml"
    path.write_bytes(b"\xef\xbb\xbfa = 1")
    refused(read_toml, path, "a byte order mark comes first; save it as UTF-8 without one")
