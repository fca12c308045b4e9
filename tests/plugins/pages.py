"""What a page of the documentation has its readers write and type."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
INSTALLING = ("pip install ", "pip wheel ")
ENTRIES = "[project.entry-points.lfm2kit]"


def page(name: str) -> str:
    """Return a page of docs/."""
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def fences(text: str, *languages: str) -> Iterator[str]:
    for language, inside in re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if language in languages:
            yield inside


def files(text: str) -> dict[str, str]:
    """Return the fences whose first line is a comment that names a file."""
    texts = fences(text, "python", "toml", "cuda")
    return {m[1]: t for t in texts if (m := re.match(r"(?:#|//) (\S+\.(?:py|toml|cu))\n", t))}


def typed(text: str) -> list[str]:
    """Return what a reader types."""
    lines = "".join(fences(text, "console")).splitlines()
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


def without_index(command: str) -> str:
    """Return what a reader types to install, in a form that installs nothing and needs no index."""
    command += " --no-index --no-deps --no-build-isolation"
    if command.startswith("pip wheel "):
        return command
    # That of a wheel is to look at it, and not at what is there already.
    return command + " --dry-run" + " --ignore-installed" * ("--find-links" in command)


def headings(text: str) -> set[str]:
    """Return what links within a page lead to."""
    found = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}
