"""A command typed in this process, and its failure: exit code 2 and one line."""

from __future__ import annotations

import sys
from typing import NamedTuple

import pytest

from lfm2kit.__main__ import main


class Typed(NamedTuple):
    code: int
    out: str
    err: str

    def assert_fails(self, *words: str) -> None:
        """Exit code 2, nothing on stdout, and one line on stderr with all the words in it."""
        assert self.code == 2, self
        assert self.out == ""
        (line,) = self.err.splitlines()
        assert line.startswith("lfm2kit: error: ")
        for word in words:
            assert word in line


class Cli:
    """A runner of commands, exactly as the console script runs them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch = monkeypatch
        self.capsys = capsys

    def __call__(self, *arguments: object) -> Typed:
        self.monkeypatch.setattr(sys, "argv", ["lfm2kit", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()  # always ends so: the code is 0 where all is well
        captured = self.capsys.readouterr()
        return Typed(int(ended.value.code or 0), captured.out, captured.err)
