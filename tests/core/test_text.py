"""Text from outside is printed as one line of harmless characters, and not too long."""

from __future__ import annotations

import pytest

from lfm2kit.text import LONGEST, printable, shortened


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, ünïcode, 模型 and [red]", "plain, ünïcode, 模型 and [red]"),
        ("x\nVALID", r"x\nVALID"),
        ("\r\x1b[2J\x07", r"\r\x1b[2J\x07"),
        ("\x9b31m \x7f", r"\x9b31m \x7f"),  # a terminal's command in one character, and DEL
        ("\u202egnp.exe\u2066", r"\u202egnp.exe\u2066"),  # read from right to left
        ("\u2028VALID\x0bVALID\x85VALID", r"\u2028VALID\x0bVALID\x85VALID"),  # other line ends
        ("caf\udce9", r"caf\udce9"),  # a byte of a path that is not UTF-8
    ],
)
def test_what_does_not_print_comes_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize("character", ["n", "\n", "\u202e"])
@pytest.mark.parametrize("length", [LONGEST // 3, LONGEST, LONGEST + 1, 20_000_000])
def test_a_long_text_loses_its_middle_and_says_so(length: int, character: str) -> None:
    said = shortened("tensor '" + character * length + "': give another")
    assert len(said) <= LONGEST
    assert said.startswith("tensor '")
    assert said.endswith("': give another")
    is_whole = len(printable(character)) * length < 450
    assert ("shortened from" in said) != is_whole
    assert shortened("short") == "short"
