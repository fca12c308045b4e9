"""The pages of the documentation, and the commands of lfm2kit that they tell readers to type."""

from __future__ import annotations

import re
import runpy
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "build_site.py"))
FENCE = re.compile(r"^(`{3,})(\w*)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^ {4,}(\S.*)$", re.MULTILINE)
CONTINUED = re.compile(r"\\\n\s*")
# What may stand before a command: a variable, what starts ranks, or Docker's word.
STARTED = r"(?:[A-Z_0-9]+=\S+ |mpirun .*? |scripts/network\.py .* -- |RUN )*"
MKDIR = re.compile(r"mkdir (\S+)")
COMMAND = re.compile(rf"({STARTED})(?:\S*/)?(lfm2kit|run\.sh)(?: (.*))?")


class Command(NamedTuple):
    """A command of lfm2kit on a page."""

    page: str
    before: str  # what stands in front of it
    words: tuple[str, ...]  # behind `lfm2kit`
    stdin: str | None = None  # the files of `<` and `>`
    stdout: str | None = None
    folders: tuple[str, ...] = ()  # that are made for it, since the command before

    @property
    def name(self) -> str:
        return self.words[0]

    @property
    def typed(self) -> str:
        """Return all that is typed, files included."""
        return " ".join((self.before, str(self), self.stdin or "", self.stdout or "")).strip()

    def __str__(self) -> str:
        return shlex.join(["lfm2kit", *self.words])


def pages() -> list[str]:
    """Return the pages, but for the reference of commands, which shows their usage."""
    paths = sorted(set(SCRIPT["pages"]()))
    return [str(p) for p in paths if p.suffix == ".md" and p.name != "commands.md"]


def commands(page: str) -> list[Command]:
    """Return a page's commands, in its order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    lines = CONTINUED.sub("", "\n".join(_typed(text))).splitlines()
    return list(_commands(page, (part for line in lines for part in line.split(" && "))))


def _commands(page: str, parts: Iterable[str]) -> Iterator[Command]:
    folders: list[str] = []
    for part in parts:
        if made := MKDIR.fullmatch(part):
            folders.append(made[1])
        elif found := COMMAND.fullmatch(part):
            yield _command(page, *found.groups(""))._replace(folders=tuple(folders))
            folders.clear()


def _typed(text: str) -> Iterator[str]:
    """Yield what stands in blocks of a shell, which are those with a prompt, or indented."""
    for _, language, body in FENCE.findall(text):
        if language == "console":
            yield from re.findall(r"^(?:\$ |> )?(.+)$", body, re.MULTILINE)
        elif language in ("sh", "bash"):
            yield from body.splitlines()
    yield from INDENTED.findall(FENCE.sub("", text))


def _command(page: str, before: str, program: str, typed: str) -> Command:
    words = shlex.split(typed, comments=True)
    if program == "run.sh":
        words[:1] = ["grade"] if words[:1] == ["--grade"] else ["run", *words[:1]]
    streams = {}
    for sign in "<>":
        if sign in words:
            at = words.index(sign)
            _, streams[sign] = words[at : at + 2]
            del words[at : at + 2]
    return Command(
        page,
        before,
        tuple(words),
        streams.get("<"),
        streams.get(">"),
    )
