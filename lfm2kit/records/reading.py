"""Reads the records that commands have written, of lfm2kit or of a plugin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from lfm2kit.building.records import Record
from lfm2kit.checkpoint.documents import parse_json, read_json
from lfm2kit.errors import Lfm2kitError, Option, choices
from lfm2kit.records.figures import Better, Figure
from lfm2kit.records.schemas import schemas

OURS = "lfm2kit "  # how the kinds of lfm2kit's own commands begin
VERSION = 1  # of these
HEAD = ("kind", "version", "date", "machine", "options")
MOST_VERSION = 10**9


class Read(NamedTuple):
    """A record, and what errors call it."""

    name: str
    kind: str
    version: int
    date: str
    machine: Mapping[str, Any]
    options: Mapping[str, Any]
    fields: Mapping[str, Any]  # the command's own
    figures: Mapping[str, Figure]


def read_record(path: Path) -> Read:
    """Return the record in a file; raise `Lfm2kitError` if it is not one."""
    return _read(str(path), read_json(path))


def parse_record(name: str, text: bytes) -> Read:
    """Return the record in a text, as `read_record` does."""
    return _read(name, parse_json(Path(name), text))


def _read(name: str, fields: dict[str, Any]) -> Read:
    if "kind" not in fields or "figures" not in fields:
        missing = "kind" if "kind" not in fields else "figures"
        said = (
            f"{name}: there is no '{missing}', so it is not a record; commands write records with "
        )
        raise Lfm2kitError(said, Option("json"))
    record = Record(f"{name}: ", fields)
    figures = [_figure(one) for one in record.records("figures")]
    read = Read(
        name,
        record.text("kind"),
        record.whole("version", 1, MOST_VERSION),
        record.text("date"),
        record.fields("machine"),
        record.fields("options"),
        {key: value for key, value in fields.items() if key not in (*HEAD, "figures")},
        {figure.name: figure for figure in figures},
    )
    _check(read, figures)
    return read


def _figure(record: Record) -> Figure:
    better = record.optional("better", lambda key: record.choice(key, ("higher", "lower")))
    figure = Figure(
        record.text("name"), record.text("unit"), cast(Better, better), record.numbers("values")
    )
    if not figure.values:
        raise record.fail("values", "one number or more")
    record.done()
    return figure


def _check(read: Read, figures: list[Figure]) -> None:
    """Raise `Lfm2kitError` for an unknown kind or version, and for a name that comes twice."""
    if read.kind.startswith(OURS):
        _check_ours(read)
    for name in _twice(figures):
        raise Lfm2kitError(f"{read.name}: there are two figures '{name}'; keep the right one")


def _check_ours(read: Read) -> None:
    if read.kind not in (known := schemas()):
        raise Lfm2kitError(f"{read.name}: unknown kind '{read.kind}'; {choices(read.kind, known)}")
    if read.version != VERSION:
        reads = f"this lfm2kit reads {VERSION}"
        raise Lfm2kitError(f"{read.name}: the version is {read.version}, and {reads}")


def _twice(figures: list[Figure]) -> Iterator[str]:
    names = [figure.name for figure in figures]
    yield from (name for name in dict.fromkeys(names) if names.count(name) > 1)
