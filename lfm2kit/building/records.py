"""Reads the JSON files that lfm2kit writes about a machine or a model's load.

Each field is asked for with its type and its bounds.  What is missing, unknown or out of bounds is
one line that names the file and the field.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from reprlib import repr as brief  # of what a file says, however long it is
from typing import Any, TypeVar

from lfm2kit.checkpoint.documents import read_json
from lfm2kit.errors import Lfm2kitError, choices

T = TypeVar("T")

LEAST, MOST = 1e-12, 1e18  # seconds, or bytes and operations per second, of any machine
A_RATE = f"a number from {LEAST:g} to {MOST:g}"


class Record:
    """The fields of a JSON object; `where` is what errors call it."""

    def __init__(self, where: str, fields: Mapping[str, Any]) -> None:
        self.where = where
        self._fields = fields
        self._asked: set[str] = set()

    def text(self, key: str) -> str:
        return str(self._checked(key, "a text", lambda value: isinstance(value, str)))

    def texts(self, key: str) -> dict[str, str]:
        """Return an object of texts, whatever its keys are."""

        def holds(value: Any) -> bool:
            return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())

        return dict(self._checked(key, "an object of texts", holds))

    def has(self, key: str) -> bool:
        return key in self._fields

    def whole(self, key: str, least: int, most: int) -> int:
        expected = f"a whole number from {least} to {most}"
        return int(self._checked(key, expected, lambda value: _is_whole(value, least, most)))

    def rate(self, key: str) -> float:
        """Return a number of seconds, or of anything per second."""
        return float(self._checked(key, A_RATE, _is_rate))

    def optional(self, key: str, read: Callable[[str], T]) -> T | None:
        """Return what `read` returns for `key`, or None where the file says null."""
        return None if self._value(key) is None else read(key)

    def wholes(self, key: str, least: int, most: int) -> tuple[int, ...]:
        expected = f"a whole number from {least} to {most}"
        return tuple(self._list(key, expected, lambda value: _is_whole(value, least, most)))

    def rates(self, key: str) -> tuple[float, ...]:
        return tuple(map(float, self._list(key, A_RATE, _is_rate)))

    def numbers(self, key: str) -> tuple[float, ...]:
        return tuple(map(float, self._list(key, "a number", _is_number)))

    def choice(self, key: str, among: Collection[str]) -> str:
        """Return one of some texts."""
        expected = f"one of {', '.join(among)}"
        return str(self._checked(key, expected, lambda value: value in among))

    def records(self, key: str) -> list[Record]:
        items = self._list(key, "an object", lambda value: isinstance(value, dict))
        return [Record(f"{self.where}{key}[{i}].", item) for i, item in enumerate(items)]

    def fields(self, key: str) -> dict[str, Any]:
        """Return an object as it is in the file."""
        return dict(self._checked(key, "an object", lambda value: isinstance(value, dict)))

    def record(self, key: str) -> Record:
        return Record(f"{self.where}{key}.", self.fields(key))

    def done(self) -> None:
        """Raise `Lfm2kitError` for a field that nobody has asked for."""
        for key in self._fields:
            if key not in self._asked:
                raise Lfm2kitError(f"{self.where}{key} is unknown; {choices(key, self._asked)}")

    def fail(self, key: str, expected: str) -> Lfm2kitError:
        """Return the error for a field that does not hold what is expected of it."""
        return Lfm2kitError(f"{self.where}{key} is {brief(self._value(key))}; expected {expected}")

    def _value(self, key: str) -> Any:
        self._asked.add(key)
        if key not in self._fields:
            raise Lfm2kitError(f"{self.where}{key} is missing")
        return self._fields[key]

    def _checked(self, key: str, expected: str, holds: Callable[[Any], bool]) -> Any:
        value = self._value(key)
        if not holds(value):
            raise self.fail(key, expected)
        return value

    def _list(self, key: str, expected: str, holds: Callable[[Any], bool]) -> list[Any]:
        values: list[Any] = self._checked(key, "a list", lambda value: isinstance(value, list))
        for i, value in enumerate(values):
            if not holds(value):
                raise Lfm2kitError(f"{self.where}{key}[{i}] is {brief(value)}; expected {expected}")
        return values


def read_record(path: Path, kind: str, version: int, made_by: str) -> Record:
    """Return the fields of the JSON file of a kind; raise `Lfm2kitError` for any other file."""
    fields = read_json(path)
    if fields.get("kind") != kind:
        said = brief(fields["kind"]) if "kind" in fields else "not there"
        raise Lfm2kitError(f"{path}: 'kind' is {said}, not '{kind}'; {made_by}")
    record = Record(f"{path}: ", fields)
    record.text("kind")
    if not _is_whole(fields.get("version"), version, version):
        raise record.fail("version", f"{version}, which this lfm2kit reads; {made_by}")
    record.whole("version", version, version)
    return record


def _is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_rate(value: Any) -> bool:
    return _is_number(value) and LEAST <= value <= MOST


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
