"""Shows the results of a conformance suite, and ends the command by them."""

from __future__ import annotations

from collections.abc import Sequence

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Column

from lfm2kit.cli.console import Report, only_said, show_table
from lfm2kit.errors import WRONG_RESULT
from lfm2kit.testing.runner import Result


def conclude(
    report: Report, kind: str, name: str, results: Sequence[Result], **options: object
) -> None:
    """Print a table of the verdicts on the backend or transport `name`, and write the document.

    The document has the options with which the checks can be repeated.
    Exit with code 1 if a check failed.
    """
    if report.target != "-":
        show_table(
            [(result.id, result.verdict, result.detail) for result in results],
            Column("check", no_wrap=True),  # to be copied into --only
            Column("verdict", no_wrap=True),
            Column("detail"),
            title=f"conformance of '{name}'",
            box=SIMPLE_HEAD,
        )
    failed = [result.id for result in results if result.verdict == "failed"]
    counts = {v: sum(r.verdict == v for r in results) for v in ("passed", "failed", "skipped")}
    report.line(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    report.fields = {kind: name, **options, **counts, "results": [r._asdict() for r in results]}
    with only_said(when=bool(failed)):
        report.write()
    if failed:
        raise typer.Exit(WRONG_RESULT)
