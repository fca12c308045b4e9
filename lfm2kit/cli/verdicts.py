"""Shows the results of a conformance suite, and ends the command by them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Column

from lfm2kit.cli.console import only_said, show_details, show_table
from lfm2kit.cli.flags import flag
from lfm2kit.cli.report import Report
from lfm2kit.errors import TRACEBACK, WRONG_RESULT, Option
from lfm2kit.testing.runner import Result

ALWAYS_COUNTED = ("passed", "failed", "skipped")


def conclude(
    report: Report,
    kind: str,
    name: str,
    results: Sequence[Result],
    again: Sequence[Option] = (),
    only: Sequence[object] = (),
    notes: Sequence[str] = (),
    **options: object,
) -> None:
    """Print a table of the verdicts on the backend or transport `name`, and write the document.

    With the options `again`, and with `only` beside ids, the command does the same again; the
    document has the `notes` and the `options`.
    Exit with code 1 if a check failed.
    """
    if report.target != "-":
        show_table(
            [(result.id, result.verdict, _said(result)) for result in results],
            Column("check", no_wrap=True),  # to be copied into --only
            Column("verdict", no_wrap=True),
            Column("detail"),
            title=f"conformance of '{name}'",
            box=SIMPLE_HEAD,
        )
    failed = [result for result in results if result.verdict == "failed"]
    counts = {v: sum(r.verdict == v for r in results) for v in ALWAYS_COUNTED}
    others = Counter(r.verdict.replace("-", " ") for r in results if r.verdict not in counts)
    report.line(", ".join(f"{count} {verdict}" for verdict, count in (counts | others).items()))
    for note in notes:
        report.line(note)
    if failed:
        some = Option("only", ",".join([*(result.id for result in failed), *map(str, only)]))
        words = [f"lfm2kit {kind}s check {name}", *map(flag, (some, *again))]
        report.line(f"to repeat what failed: {' '.join(words)}")
    _show_tracebacks(report, failed)
    report.fields = {
        kind: name,
        **options,
        **counts,
        "notes": notes,
        "results": [r._asdict() for r in results],
    }
    with only_said(when=bool(failed)):
        report.write()
    if failed:
        raise typer.Exit(WRONG_RESULT)


def _said(result: Result) -> str:
    return "; ".join(filter(None, (result.detail, *result.notes)))


def _show_tracebacks(report: Report, failed: Sequence[Result]) -> None:
    """Print the tracebacks of failures on stderr if they are asked for, or how to ask."""
    tracebacks = [result.traceback for result in failed if result.traceback]
    if os.environ.get(TRACEBACK):
        for one in tracebacks:
            show_details(one)
    elif tracebacks:
        report.line(f"with tracebacks: {TRACEBACK}=1")
