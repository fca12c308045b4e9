"""Where text goes: results to stdout, everything else to stderr; progress only to a terminal.

All that commands print goes through here, and is made printable here (`lfm2kit.text`).
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from lfm2kit.building.byte_counts import size
from lfm2kit.cli.flags import told
from lfm2kit.errors import Lfm2kitError
from lfm2kit.outputs.files import replaced
from lfm2kit.text import LONGEST, indented, printable, shortened

err = Console(stderr=True, highlight=False, soft_wrap=True)

STDOUT = "-"
BYTES = "bytes"  # the unit of progress that is shown in kB, MB or GB


def complain(sentence: str) -> None:
    _say(("lfm2kit:", "bold red"), " error: ", sentence)


def remark(sentence: str) -> None:
    _say(("lfm2kit:", "dim"), " ", sentence)


def _say(name: tuple[str, str], between: str, sentence: str) -> None:
    """Print a line on stderr, at most `LONGEST` characters long."""
    said = shortened(sentence, LONGEST - len(name[0]) - len(between))
    err.print(Text.assemble(name, between, said))


def show_traceback(error: BaseException) -> None:
    """Print the traceback of `error` on stderr."""
    show_details("".join(traceback.format_exception(error)))


def show_details(text: str) -> None:
    """Print a longer text on stderr, indented (`lfm2kit.text.indented`)."""
    for line in indented(text):
        err.print(Text(line))


def show_table(
    rows: Iterable[Iterable[str]], *columns: Column, title: str | None = None, **style: Any
) -> None:
    """Print a table on stdout; in a file or a pipe, cells are not cut to a terminal's width."""
    table = Table(*columns, title=title and Text(printable(title)), **style)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    Console(width=None if sys.stdout.isatty() else 10_000, highlight=False).print(table)


def write_document(path: Path, fields: Mapping[str, Any]) -> None:
    """Write a JSON document in ASCII; raise `Lfm2kitError` if it cannot be written.

    A path that is not UTF-8 has surrogates, from which `os.fsencode` restores its bytes.
    """
    with replaced(path, remark) as file:
        file.write(as_json(fields).encode() + b"\n")


def as_json(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, indent=2).replace("\x7f", "\\u007f")


@contextmanager
def only_said(when: bool) -> Iterator[None]:
    """Print an `Lfm2kitError` instead of raising it, when worse news sets the exit code."""
    try:
        yield
    except Lfm2kitError as error:
        if not when:
            raise
        complain(told(error))


@contextmanager
def progress(
    title: str, total: int, unit: str, *, visible: bool = True
) -> Iterator[Callable[[int], None]]:
    """Yield a function that advances a progress bar, which is shown only on a terminal.

    `unit` is what is counted, in the plural, or `BYTES`.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
    )
    hidden = not (visible and err.is_terminal)
    with Progress(*columns, console=err, transient=True, disable=hidden) as bar:
        task = bar.add_task(printable(title), total=total, amount="")

        def advance(amount: int) -> None:
            done = bar.tasks[task].completed + amount
            rate = done / max(bar.tasks[task].elapsed or 0, 1e-9)
            if unit == BYTES:
                text = f"{size(done)} of {size(total)}, {size(rate)}/s"
            else:
                text = f"{done}/{total} {unit}, {rate:.3g} {unit}/s"
            bar.update(task, advance=amount, amount=text)

        yield advance


@contextmanager
def stage(title: str, total: int, unit: str) -> Iterator[Callable[[], None]]:
    """Yield a function that counts one more of `total` in a progress bar."""
    with progress(title, total, unit) as advance:
        yield lambda: advance(1)
