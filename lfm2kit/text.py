"""Text that came from outside, made fit to be printed.

Paths, names, configuration values and the texts of exceptions may hold line ends, a terminal's
commands, or characters that reorder a line.  They are shown escaped, as Python writes them.
"""

from __future__ import annotations

LONGEST = 500  # characters of a line on stderr


def printable(text: str) -> str:
    """`text` as one line; characters that do not print come escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shortened(text: str, length: int = LONGEST) -> str:
    """`printable(text)`, without its middle where that takes it to `length` characters at most.

    What an error is about stands at its beginning, and what to do at its end.
    """
    total = len(text)
    if total > length:  # nobody waits for megabytes to be escaped
        text = text[:length] + text[-length:]
    text = printable(text)
    if len(text) <= length:
        return text
    note = f" [... shortened from {total} characters ...] "
    kept = (length - len(note)) // 2
    return text[:kept] + note + text[-kept:]


def indented(text: str) -> list[str]:
    """The lines of a longer text, printable, and indented: none can be taken for one of ours."""
    lines = text.rstrip().split("\n") if text.strip() else []
    return [f"  {shortened(line)}" for line in lines]
