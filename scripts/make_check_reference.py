"""Writes the checks of the conformance suite into docs/testing.md, from their docstrings.

python scripts/make_check_reference.py
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from lfm2kit.testing.checks import CHECKS, Check

PAGE = Path(__file__).parents[1] / "docs" / "testing.md"
BEGIN = "<!-- The rest is written by scripts/make_check_reference.py from the docstrings. -->\n"
WIDTH = 110


def page() -> str:
    """Return the whole page: what stands before `BEGIN`, and every check behind it."""
    before, _, _ = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return before + BEGIN + "\n" + "\n".join(_lines())


def _lines() -> Iterator[str]:
    for module, checks in groupby(CHECKS.values(), lambda check: inspect.getmodule(check.run)):
        assert module is not None
        yield f"### {module.__name__.rpartition('.')[2].replace('_', ' ')}\n"
        yield _filled(inspect.getdoc(module) or "") + "\n"
        yield from map(_item, checks)
        yield ""


def _item(check: Check) -> str:
    promise = "" if check.promise is None else f" Guards `{check.promise.name}`."
    return _filled(f"- `{check.id}`: {check.documentation}{promise}", indent="  ")


def _filled(text: str, indent: str = "") -> str:
    words = " ".join(text.split())
    return textwrap.fill(
        words, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE.name}: written")
