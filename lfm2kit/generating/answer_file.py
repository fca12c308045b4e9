"""The file that answers go to while they come, and from which a later run goes on.

A line that is there is kept if it has the key of what is asked now.  Answers are added as soon as
they end, so that a run that is killed loses none, and are put in order at the end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lfm2kit import bounds
from lfm2kit.checkpoint.documents import parse_json
from lfm2kit.checkpoint.file_kinds import check_file
from lfm2kit.errors import Lfm2kitError
from lfm2kit.generating.prompt_file import NOWHERE, Asked, Broken
from lfm2kit.outputs.files import Note, replaced

BEGINNING = b'{"line": '  # of each line that is written here
LINE, KEY, ERROR = "line", "key", "error"


class AnswerFile:
    """The answers in a file, by the line of the prompt.

    Raise `Lfm2kitError` if the file has anything but answers to these prompts: it might be
    another file, whose content nobody wants to lose.
    """

    def __init__(self, path: Path, asked: Iterable[Asked | Broken], note: Note) -> None:
        self._path = path
        self._note = note
        self._keys = {one.number: one.key for one in asked if isinstance(one, Asked)}
        self._size = _size_of(path)  # as this process knows it
        self._lines = {n: line for n, key, line in _read(path) if self._is_kept(n, key)}
        self.kept = frozenset(self._lines)  # the lines that have answers already
        if path.exists():
            self.put_in_order()  # and leave out errors, and half a line of a run that was killed

    def add(self, number: int, fields: dict[str, Any]) -> None:
        """Add the answer to a line, or what is wrong with it, to the end of the file."""
        key = {KEY: self._keys[number]} if number in self._keys and ERROR not in fields else {}
        line = json.dumps({LINE: number, **fields, **key}).encode() + b"\n"
        self._check_alone()
        self._lines[number] = line
        try:
            with open(self._path, "ab") as file:
                file.write(line)
        except OSError as error:
            raise Lfm2kitError(f"{self._path}: {error.strerror}") from None
        self._size += len(line)

    def put_in_order(self) -> None:
        """Write the file anew, in the order of the prompts."""
        self._check_alone()
        with replaced(self._path, self._note) as file:
            file.writelines(self._lines[number] for number in sorted(self._lines))
        self._size = _size_of(self._path)

    def _check_alone(self) -> None:
        """Raise `Lfm2kitError` if another process has written to the file: its text would be lost.

        The size shows it, also where a file system has no locks.
        """
        if _size_of(self._path) != self._size:
            raise Lfm2kitError(
                f"{self._path}: another process has changed this file meanwhile; give another file "
                "for these answers, or repeat the command when that process has ended"
            )

    def _is_kept(self, number: int, key: str | None) -> bool:
        """Return whether a line is an answer; `Lfm2kitError` if it is one to something else."""
        if key is not None and self._keys.get(number) != key:
            raise Lfm2kitError(
                f"{self._path}: it has an answer to line {number} that is of another prompt, other "
                "options or another model; give another file"
            )
        return key is not None


def _size_of(path: Path) -> int:
    """Return the bytes of a file; none if it is not there."""
    return os.path.getsize(path) if os.path.exists(path) else 0


def _read(path: Path) -> Iterator[tuple[int, str | None, bytes]]:
    """Yield line number, key and text of each line in a file; no key where it is an error.

    The file may be of any size: it grows with the answers.
    """
    if not _size_of(path):
        return
    check_file(path, is_text=True)
    try:
        with open(path, "rb") as file:
            while line := file.readline(bounds.ANSWER + 1):
                if len(line) > bounds.ANSWER:
                    raise _not_ours(path)
                text = line.removesuffix(b"\n")
                if text == line and _is_cut_off(line):  # else it lacks its end alone
                    return
                yield _parsed(path, text)
    except OSError as error:
        raise Lfm2kitError(f"{path}: {error.strerror}") from None


def _is_cut_off(last: bytes) -> bool:
    """Return whether a line without an end is one that a killed run has begun."""
    return BEGINNING.startswith(last) or (last.startswith(BEGINNING) and not _is_json(last))


def _is_json(line: bytes) -> bool:
    try:
        return bool(parse_json(NOWHERE, line))
    except Lfm2kitError:
        return False


def _parsed(path: Path, line: bytes) -> tuple[int, str | None, bytes]:
    try:
        fields = parse_json(path, line)
    except Lfm2kitError:
        raise _not_ours(path) from None
    match fields:
        case {"line": int(number), "key": str(key), "answers": list()}:
            return number, key, line + b"\n"
        case {"line": int(number), "error": str()}:
            return number, None, line + b"\n"
    raise _not_ours(path)


def _not_ours(path: Path) -> Lfm2kitError:
    return Lfm2kitError(f"{path}: it has other lines than answers to prompts; give another file")
