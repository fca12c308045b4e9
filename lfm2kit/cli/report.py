"""Lines for people, and the JSON document that `--json` asks for: mostly a versioned record."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lfm2kit.backend import Context
from lfm2kit.checkpoint import check_no_part
from lfm2kit.cli import given
from lfm2kit.cli.console import STDOUT, as_json, write_document
from lfm2kit.errors import Lfm2kitError
from lfm2kit.outputs.files import check_target
from lfm2kit.outputs.targets import check_apart
from lfm2kit.records.figures import Better, Figure
from lfm2kit.records.machine import described, now
from lfm2kit.text import printable


class Output:
    """What a command prints, and the document that goes to the target of `--json`, if it has one.

    With `--json -` stdout has the document alone, and stderr the lines.
    """

    def __init__(self, target: str | None) -> None:
        self.target = target
        if target == "":
            raise Lfm2kitError(f"--json '': the path is empty; give one, or {STDOUT} for stdout")
        if self.path is not None:
            check_target("--json", self.path)
            check_no_part("--json", self.path)
        self.check_apart({})

    @property
    def path(self) -> Path | None:
        """Return the file that the document goes to."""
        return None if self.target in (None, STDOUT) else Path(self.target)

    def check_apart(self, reads: Mapping[str, Iterable[Path]]) -> None:
        """Raise `Lfm2kitError` if the document would take the place of a file that is read."""
        check_apart({"--json": self.path}, reads)

    def line(self, text: str = "") -> None:
        """Print `text` as one line."""
        stream = sys.stderr if self.target == STDOUT else sys.stdout
        print(printable(text), file=stream, flush=True)

    def put(self, document: Mapping[str, Any]) -> None:
        """Write a document in ASCII; NaN and infinities, which JSON lacks, become null."""
        if self.target == STDOUT:
            print(as_json(_without_nan(document)))
        elif self.path is not None:
            write_document(self.path, _without_nan(document))


class Report(Output):
    """A command's result: lines for people, and a versioned record for programs.

    `kind` and `version` say which fields a record has; `machine` is where the work was done.
    """

    def __init__(self, target: str | None, kind: str, version: int = 1) -> None:
        super().__init__(target)
        self.machine: Mapping[str, Any] | None = None  # None: no model was set up
        self.fields: dict[str, Any] = {}  # the command's own
        self._head = {"kind": kind, "version": version, "date": now()}
        self._options = given.options()
        self._figures: dict[str, Figure] = {}

    def figure(
        self, name: str, unit: str, values: Iterable[float | None], better: Better = None
    ) -> None:
        """Add a figure with a value for each repetition; without any value it is left out."""
        if name in self._figures:
            raise ValueError(f"there is a figure '{name}' already")
        one = Figure.of(name, unit, values, better)
        if one.values:
            self._figures[name] = one

    def record(self) -> Any:
        """Return the record: what was asked, where, and what came of it.

        NaN and infinities are None.
        """
        head = {
            **self._head,
            "machine": dict(self.machine or described(Context())),
            "options": self._options,
        }
        figures = {"figures": [one.document() for one in self._figures.values()]}
        if taken := self.fields.keys() & {*head, *figures}:
            raise ValueError(f"every record has a field '{min(taken)}'; give this one another name")
        return _without_nan(head | self.fields | figures)

    def write(self) -> None:
        """Write the record, if that is asked for."""
        if self.target is not None:
            self.put(self.record())


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    is_nan = isinstance(value, float) and not abs(value) < float("inf")
    return None if is_nan else value
