"""What the checks of the conformance suite are: their list, and what each of them guards."""

from __future__ import annotations

from rich.table import Column

from lfm2kit.cli.console import Report, show_table
from lfm2kit.testing.checks import CHECKS
from lfm2kit.testing.runner import selected


def show_checks(report: Report) -> None:
    """Print a table with the id of each check and what it guards, and write the document."""
    rows = [(check.id, check.summary) for check in CHECKS.values()]
    if report.target != "-":
        show_table(rows, Column("check", no_wrap=True), Column("what it guards", overflow="fold"))
    report.fields = {"checks": [{"id": name, "summary": summary} for name, summary in rows]}
    report.write()


def explain_check(report: Report, name: str) -> None:
    """Print the documentation of a check, and write the document.

    Raise `Lfm2kitError` if there is no such check.
    """
    (known,) = selected([name])
    check = CHECKS[known]
    report.line(f"{check.id}: {check.documentation}")
    report.line()
    report.line(f"To run it alone: lfm2kit backends check NAME --only {check.id}")
    report.fields = {"id": check.id, "documentation": check.documentation}
    report.write()
