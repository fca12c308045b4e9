"""The conformance suite on a backend; the list of its checks, and what each of them guards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.table import Column

from lfm2kit.backend import Context
from lfm2kit.building.plugins import installed_plugins
from lfm2kit.checkpoint.names import CONFIG
from lfm2kit.cli.asked import Asked
from lfm2kit.cli.console import progress, show_table
from lfm2kit.cli.report import Report
from lfm2kit.cli.specs import described
from lfm2kit.cli.verdicts import conclude
from lfm2kit.promises import Promise
from lfm2kit.records.machine import machine_with
from lfm2kit.testing.checks import CHECKS
from lfm2kit.testing.runner import Result, run_checks
from lfm2kit.testing.scope import OUT_OF_SCOPE, Scope, examples_here
from lfm2kit.testing.selection import selected, selection
from lfm2kit.testing.version import SUITE_VERSION
from lfm2kit.testing.widths import Widths


def judge(report: Report, name: str, context: Context, asked: Asked) -> None:
    """Run the checks on a backend, show the verdicts, and exit with code 1 if one fails."""
    widths = None if asked.model is None else _widths(asked.model)
    ids, patterns = selection(asked.only, widths)
    asked_examples = 0 if asked.examples is None and widths is not None else asked.examples
    scope = Scope(asked.seed, examples_here(asked_examples), patterns, widths)
    plugins = installed_plugins()
    with progress(f"checking {name}", len(ids), "checks") as advance, _keeping_nothing(scope):
        results = run_checks(name, plugins, context, ids, scope=scope, done=lambda _: advance(1))
    shown = [result for result in results if result.detail != OUT_OF_SCOPE]
    made: dict[str, object] = {
        "suite_version": SUITE_VERSION,
        "seed": scope.seed,
        "examples": scope.examples,
        "blocks": list(map(str, patterns)),
        "model": asked.model,
    }
    report.machine = machine_with(context, plugins, name)
    taken_back = plugins.backend(name).not_promised
    notes = list(_kept_all_the_same(taken_back, results))
    made["not_promised"] = sum(result.verdict == "not-promised" for result in results)
    made["taken_back"] = {promise.name: reason for promise, reason in taken_back.items()}
    conclude(report, "backend", name, shown, asked.again(context), patterns, notes, **made)


def _kept_all_the_same(taken_back: Iterable[Promise], results: Sequence[Result]) -> Iterator[str]:
    """Yield a note on each promise that is taken back, but holds wherever it was looked at."""
    for promise in taken_back:
        seen = [r for r in results if r.promise == promise.name and r.verdict == "not-promised"]
        if seen and not any(result.differs for result in seen):
            cases = sum(result.cases for result in seen)
            yield f"{promise.name} holds in all {cases} cases: it could be promised"


def _widths(model: str) -> Widths:
    """Return the widths of a model, of which a folder needs no weights."""
    config = Path(model) / CONFIG
    return Widths.of_model(described(str(config) if config.is_file() else model))


@contextmanager
def _keeping_nothing(scope: Scope) -> Iterator[None]:
    """Leave no file of hypothesis behind, where it is used."""
    if not scope.examples:
        yield
        return
    from lfm2kit.testing.draws import keeping_nothing

    with keeping_nothing():
        yield


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
    for line in f"{check.id}: {check.documentation}".splitlines():
        report.line(line)
    report.line()
    if check.promise is not None:
        report.line(f"It guards {check.promise.name}: {check.promise.value}.")
    report.line(f"To run it alone: lfm2kit backends check NAME --only {check.id}")
    promise = None if check.promise is None else check.promise.name
    report.fields = {"id": check.id, "documentation": check.documentation, "promise": promise}
    report.write()
