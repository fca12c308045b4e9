"""Shows generated text while it comes: in a pipe as it is, on a terminal harmless, thoughts dim."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from lfm2kit.chat.thinking import Part
from lfm2kit.cli.console import STDOUT
from lfm2kit.text import harmless

DIM, PLAIN = "\x1b[2m", "\x1b[0m"


class Voice:
    """A writer of text to stdout; to stderr where stdout is for the JSON document alone."""

    def __init__(self, json: str | None) -> None:
        self._stream = sys.stderr if json == STDOUT else sys.stdout
        self.is_terminal = self._stream.isatty()

    def say(self, parts: Iterable[Part]) -> None:
        """Show parts of a text at once."""
        for part in parts:
            text = harmless(part.text) if self.is_terminal else part.text
            is_dim = part.is_thought and self.is_terminal and not os.environ.get("NO_COLOR")
            self._stream.write(f"{DIM}{text}{PLAIN}" if is_dim else text)
        self._stream.flush()

    def line(self, text: str = "") -> None:
        """End the line, after `text`."""
        self._stream.write(f"{text}\n")
        self._stream.flush()

    @contextmanager
    def ending_its_line(self) -> Iterator[None]:
        """End the line on a terminal if Ctrl-C ends the text; a pipe gets nothing that is not text.

        The line about the interrupt follows.
        """
        try:
            yield
        except KeyboardInterrupt:
            if self.is_terminal:
                self.line()
            raise
