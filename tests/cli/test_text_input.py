"""A stdin that cannot be read is one line, in every command that reads it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.cli.test_commands import Cli, cli, fails

__all__ = ["cli"]


class Folder:
    """What reading a folder is like, where an interpreter gets as far as that."""

    def read(self, size: int) -> bytes:
        raise IsADirectoryError(21, "Is a directory")

    readline = read


@pytest.fixture
def for_writing(tmp_path: Path) -> Iterator[Any]:
    descriptor = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
    with os.fdopen(descriptor, "rb") as file:
        yield file


@pytest.mark.parametrize("command", [("chat",), ("generate", "-"), ("tokenize", "-")])
def test_a_stdin_that_cannot_be_read_is_one_line(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, for_writing: Any, command: tuple[str, ...]
) -> None:
    backend = () if command[0] == "tokenize" else ("-b", "reference")
    for buffer, why in ((for_writing, "Bad file descriptor"), (Folder(), "Is a directory")):
        stdin = SimpleNamespace(buffer=buffer, isatty=lambda: False)
        monkeypatch.setattr(sys, "stdin", stdin)
        says = f"stdin cannot be read: {why}; give a file or a pipe"
        fails(cli(*command, *backend), says)
