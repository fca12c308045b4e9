"""`lfm2kit backends matrix`: which blocks a backend builds, and which of them the suite judges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import groupby

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Column

from lfm2kit.backend import Context
from lfm2kit.building.plugins import installed_plugins
from lfm2kit.cli.console import only_said, progress, show_table
from lfm2kit.cli.report import Report
from lfm2kit.errors import WRONG_RESULT
from lfm2kit.promises import Promise
from lfm2kit.records.machine import machine_with
from lfm2kit.testing.checks import CHECKS
from lfm2kit.testing.matrix import COLUMNS, Cell, support_matrix
from lfm2kit.testing.version import SUITE_VERSION

HEADINGS = ("kind", *COLUMNS)


def show_matrix(report: Report, name: str, contexts: Sequence[Context], markdown: bool) -> None:
    """Print the matrix, or write it as a document; exit with code 1 if a check failed."""
    checks = len(contexts) * len(CHECKS)
    plugins = installed_plugins()
    reasons = {p.name: reason for p, reason in plugins.backend(name).not_promised.items()}
    with progress(f"checking {name}", checks, "checks") as advance:
        cells = support_matrix(name, plugins, contexts, done=lambda _: advance(1))
    if markdown:
        for line in _markdown(name, cells, reasons):
            report.line(line)
    elif report.target != "-":
        _show(report, name, cells, reasons)
    report.machine = machine_with(contexts[0], plugins, name)
    report.fields = {
        "backend": name,
        "suite_version": SUITE_VERSION,
        "taken_back": reasons,
        "blocks": [cell._asdict() for cell in cells],
    }
    has_failed = any(cell.state == "failed" for cell in cells)
    with only_said(when=has_failed):
        report.write()
    if has_failed:
        raise typer.Exit(WRONG_RESULT)


def _show(report: Report, name: str, cells: Sequence[Cell], reasons: Mapping[str, str]) -> None:
    for precision, some in groupby(cells, lambda cell: cell.precision):
        there = list(some)
        columns = [Column(heading, no_wrap=True) for heading in HEADINGS]
        title = f"blocks of '{name}' in {precision}, by hidden_size"
        show_table(_rows(there), *columns, title=title, box=SIMPLE_HEAD)
        for line in _details(there):
            report.line(line)
    for line in (*_not_promised(reasons), _made(name)):
        report.line(line)


def _markdown(name: str, cells: Sequence[Cell], reasons: Mapping[str, str]) -> Iterator[str]:
    yield from (f"# What `{name}` builds", "")
    yield f"{_made(name)}  A column is a range of `hidden_size`."
    for line in _not_promised(reasons):
        yield from ("", line)
    for precision, some in groupby(cells, lambda cell: cell.precision):
        there = list(some)
        yield from ("", f"## {precision}", "")
        yield _line(HEADINGS)
        yield _line(["---"] * len(HEADINGS))
        yield from map(_line, _rows(there))
        yield ""
        yield from (f"- {line}" for line in _details(there))


def _rows(cells: Sequence[Cell]) -> Iterator[list[str]]:
    """Yield a kind and its states by column, for each kind."""
    for kind, some in groupby(cells, lambda cell: cell.kind):
        states = {cell.width: cell.state for cell in some}
        yield [kind, *(states.get(column, "") for column in COLUMNS)]


def _details(cells: Sequence[Cell]) -> Iterator[str]:
    """Yield why blocks are not built, and which checks fail, with the kinds and widths."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for cell in cells:
        if cell.detail:
            kinds = found.setdefault((cell.state, cell.detail), {})
            kinds.setdefault(cell.kind, []).append(cell.width)
    for (state, detail), kinds in found.items():
        where = ", ".join(f"{kind} {'/'.join(widths)}" for kind, widths in kinds.items())
        yield f"{where}: {state}: {detail}"


def _not_promised(reasons: Mapping[str, str]) -> Iterator[str]:
    for promise, reason in reasons.items():
        yield f"not promised: {promise}, that {Promise[promise].value}: {reason}"


def _made(name: str) -> str:
    return (
        f"By lfm2kit {version('lfm2kit')}, version {SUITE_VERSION} of its suite: "
        f"`lfm2kit backends matrix {name}`."
    )


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
