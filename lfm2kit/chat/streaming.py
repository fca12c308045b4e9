"""The text of a growing list of ids, each character as soon as it is certain, up to a stop string.

The pieces together are the text of one `decode`, however the ids are cut into calls.  The time is
linear in their number, but for long runs of tokens that a decoder takes away.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection, Iterable, Sequence

from lfm2kit.chat.matching import Finder
from lfm2kit.chat.tokenizer import Tokenizer
from lfm2kit.errors import Lfm2kitError

REPLACEMENT = "\ufffd"  # stands for bytes that are not UTF-8
LONGEST = 4  # bytes, and so tokens, of a character
BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a token that is one byte, in vocabularies of characters


class TextStream:
    """The text of one answer, while its ids come in.

    `special` says which special tokens are part of the text: all, none, or those that it names,
    such as the tags of thoughts and tool calls.  `stopped` is the stop string that ended the text,
    if one did.  The text before it is given, the string itself is not, and ids that come later have
    no text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Collection[str] = (),
        *,
        special: bool | Collection[str] = False,
    ) -> None:
        if isinstance(stop, str) or not all(stop):
            raise Lfm2kitError("stop strings are a list of strings, none of them empty")
        kept = tokenizer.special.values() if special is True else special or ()
        left_out = {number for number, token in tokenizer.special.items() if token not in kept}
        decoding = ByteText if tokenizer.is_byte_level else WindowText
        self._text: ByteText | WindowText = decoding(tokenizer, left_out)
        self._finder = Finder(stop)
        self.stopped: str | None = None

    def push(self, ids: Iterable[int]) -> str:
        """Take further ids, and return the text that is now certain."""
        return "" if self.stopped else self._shown(self._text.push(ids))

    def finish(self) -> str:
        """Return what was held back, now that there are no further ids."""
        if self.stopped:
            return ""
        shown = self._shown(self._text.finish())
        return shown if self.stopped else shown + self._finder.rest()

    def _shown(self, text: str) -> str:
        found = self._finder.feed(text)
        self.stopped = found.string
        return found.before


class ByteText:
    """The text of byte-level tokens, whose bytes follow each other as the tokens do."""

    def __init__(self, tokenizer: Tokenizer, left_out: set[int]) -> None:
        self._bytes_of = tokenizer.token_bytes
        self._left_out = left_out
        self._held = b""  # the beginning of a character

    def push(self, ids: Iterable[int]) -> str:
        """Return the characters that are certain: whole ones, and U+FFFD for what can be none."""
        new = b"".join(self._bytes_of(number) for number in ids if number not in self._left_out)
        text, used = codecs.utf_8_decode(self._held + new, "replace", False)
        self._held = (self._held + new)[used:]
        if self._held >= b"\xed\xa0" and self._held[:1] == b"\xed":
            return text + self.finish()  # half of a surrogate pair, for whose end Python waits
        return text

    def finish(self) -> str:
        """Return U+FFFD for the beginning of a character that has no end."""
        held, self._held = self._held, b""
        return held.decode(errors="replace")


class WindowText:
    """The text of tokens whose text depends on those before: spaces are stripped, words joined.

    A window of ids is decoded twice: those whose text was given last, without and with those that
    are new.  The difference is their text.  Byte tokens wait for the token after them, because
    one byte that is not UTF-8 makes U+FFFD of all of them.
    """

    def __init__(self, tokenizer: Tokenizer, left_out: set[int]) -> None:
        self._tokenizer = tokenizer
        self._left_out = left_out
        self._given: list[int] = []
        self._new: list[int] = []

    def push(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, but of those at the end that wait for others."""
        return "".join(self._next(number) for number in ids if number not in self._left_out)

    def finish(self) -> str:
        """Return the text of the ids that still wait."""
        return self._difference()[1]

    def _next(self, number: int) -> str:
        piece = self._tokenizer.piece(number)
        self._new += [number] if piece else []  # an unknown id has no text
        if not piece or BYTE.fullmatch(piece):
            return ""
        whole, text = self._difference()
        if whole.endswith(REPLACEMENT) and len(self._new) < LONGEST:
            return ""
        self._given = self._tail(self._given + self._new)
        self._new = []
        return text

    def _tail(self, ids: list[int]) -> list[int]:
        """Return the new ids, and as many before them as it takes to have text of their own.

        A window without text would lose a space that is stripped at the start of a text alone.
        """
        for length in range(len(self._new), len(ids)):
            if self._decoded(ids[-length:]):
                return ids[-length:]
        return ids

    def _difference(self) -> tuple[str, str]:
        whole = self._decoded(self._given + self._new)
        return whole, whole[len(self._decoded(self._given)) :]

    def _decoded(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, special=True)
