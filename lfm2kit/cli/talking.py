"""The lines of a chat, and its commands, in a terminal or of stdin."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import takewhile

import typer

from lfm2kit import bounds
from lfm2kit.cli.console import complain, remark
from lfm2kit.cli.flags import told
from lfm2kit.cli.speaking import Voice
from lfm2kit.cli.text_input import readable
from lfm2kit.engine.room import TooLongError
from lfm2kit.errors import USER_ERROR, Lfm2kitError
from lfm2kit.generating.conversation import Conversation
from lfm2kit.generating.writer import Writer
from lfm2kit.process.interrupts import PROCESS, Interrupted

RESET, SYSTEM, EXIT = COMMANDS = "/reset", "/system", "/exit"
PROMPT = "> "
ADVICE = f"{RESET} forgets what was said before"
HELP = f"{RESET} forgets what was said, {SYSTEM} TEXT sets the system message, {EXIT} ends the chat"


class Talk:
    """The lines of a conversation, and its commands."""

    def __init__(self, writer: Writer, conversation: Conversation) -> None:
        self._writer = writer
        self._conversation = conversation
        self._voice = Voice(None)
        self._is_typing = False  # the user
        self._is_cut_off = False  # the answer, by Ctrl-C

    def run(self) -> None:
        """Answer each line of stdin until it ends, or says so."""
        if sys.stdin is None:
            raise Lfm2kitError("stdin is closed; open it, and give a message in each line")
        if not sys.stdin.isatty():
            self._answer_all(_piped())
            return
        PROCESS.give_ctrl_c_to(self.interrupt)
        try:
            for line in takewhile(_goes_on, self._typed()):
                with _complaining():
                    self._take(line)
        finally:
            PROCESS.give_ctrl_c_to(None)

    def _answer_all(self, lines: Iterable[str]) -> None:
        """Answer the lines of a pipe; end with an error if the chat had no room for one of them."""
        is_full = False
        for line in takewhile(_goes_on, lines):
            try:
                self._take(line)
            except TooLongError as error:
                if not self._conversation.has_begun:
                    raise
                complain(told(error))
                is_full = True
        if is_full:
            raise typer.Exit(USER_ERROR)

    def interrupt(self) -> None:
        """End the line that is being typed, or else the answer that is being written."""
        if self._is_typing:
            raise KeyboardInterrupt
        self._is_cut_off = True

    def _typed(self) -> Iterator[str]:
        """Yield what is typed into a terminal, until Ctrl-D."""
        with suppress(ImportError):
            import readline  # noqa: F401 - it lets lines be edited
        while True:
            try:
                self._is_typing = True
                line = input(PROMPT)
                self._is_typing = False
            except EOFError:
                self._voice.line()
                return
            except KeyboardInterrupt as error:
                self._is_typing = False
                if isinstance(error, Interrupted):
                    raise
                self._voice.line(f"\n({EXIT} or Ctrl-D ends the chat)")
            else:
                yield line

    def _take(self, line: str) -> None:
        command, _, rest = line.strip().partition(" ")
        if command in (RESET, EXIT) and rest:
            raise Lfm2kitError(f"{command} stands alone, without '{rest:.40}'; {HELP}")
        if command == RESET:
            self._conversation.reset()
        elif command == SYSTEM:
            options = self._conversation.options
            self._conversation.options = replace(options, system=rest.strip() or None)
        elif re.fullmatch("/[a-zA-Z]+", command):
            raise Lfm2kitError(f"there is no {command}; {HELP}")
        elif command:
            self._answer(line)

    def _answer(self, text: str) -> None:
        with self._advising():
            request, answer = self._conversation.ask(text, split=self._voice.is_terminal)
        self._is_cut_off = False
        try:
            while not answer.is_taken and not self._is_cut_off:
                self._voice.say(self._writer.advance(answer))
        finally:
            self._writer.leave(answer)
        if answer.token_ids or answer.error is None:
            self._voice.line()
        with self._advising():
            answer.check()
        self._conversation.keep(text, request, answer)
        if len(request.ids) + len(answer.token_ids) >= self._writer.context:
            remark(f"the context of {self._writer.context} tokens is full; {ADVICE}")

    @contextmanager
    def _advising(self) -> Iterator[None]:
        """Say with a chat that has grown too long how to begin anew."""
        try:
            yield
        except TooLongError as error:
            if not self._conversation.has_begun:
                raise
            raise TooLongError(*error.args, f"; {ADVICE}") from None


def _goes_on(line: str) -> bool:
    return line.strip() != EXIT


@contextmanager
def _complaining() -> Iterator[None]:
    """Print an `Lfm2kitError` instead of raising it: the user may go on."""
    try:
        yield
    except Lfm2kitError as error:
        complain(told(error))


def _next_line() -> bytes:
    with readable():
        return sys.stdin.buffer.readline(bounds.TEXT + 1)


def _piped() -> Iterator[str]:
    """Yield the lines of a stdin that is not a terminal."""
    while line := _next_line():
        if len(line) > bounds.TEXT:
            raise Lfm2kitError(f"stdin: a line has more than the {bounds.TEXT} bytes that are read")
        try:
            yield line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise Lfm2kitError(f"stdin is not UTF-8: {error}; convert it") from None
