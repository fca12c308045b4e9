"""Makes text from outside harmless before it is printed.

Paths, names, configuration values and the texts of exceptions may contain line ends, terminal
commands, or characters that reorder a line.  They are printed escaped, as Python writes them.
"""

from __future__ import annotations

import unicodedata

REORDERING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")  # classes of Unicode
LONGEST = 500  # characters of a line on stderr


def printable(text: str) -> str:
    """Return `text` as one line, with unprintable characters escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def is_encodable(text: str) -> bool:
    """Return whether UTF-8 can say all characters; it has no halves of surrogate pairs.

    Such a half stands for a byte of a command line that is not UTF-8.
    """
    return not any("\ud800" <= character <= "\udfff" for character in text)


def harmless(text: str) -> str:
    """Return `text` with what commands a terminal, or reorders its lines, escaped.

    Line ends and tabs stay, and so does what joins characters, as in emoji.
    """
    return "".join(repr(c)[1:-1] if _commands(c) else c for c in text)


def _commands(character: str) -> bool:
    if unicodedata.category(character) == "Cc":
        return character not in "\n\t"
    return unicodedata.bidirectional(character) in REORDERING


def shortened(text: str, length: int = LONGEST) -> str:
    """Return `printable(text)`, cut in the middle to at most `length` characters.

    An error's subject is at its beginning, and what to do about it at its end.
    """
    total = len(text)
    if total > length:  # do not escape megabytes that are not shown
        text = text[:length] + text[-length:]
    text = printable(text)
    if len(text) <= length:
        return text
    note = f" [... shortened from {total} characters ...] "
    kept = (length - len(note)) // 2
    return text[:kept] + note + text[-kept:]


def indented(text: str) -> list[str]:
    """Return the lines of a longer text, printable and indented, unlike lines of our own."""
    lines = text.rstrip().split("\n") if text.strip() else []
    return [f"  {shortened(line)}" for line in lines]
