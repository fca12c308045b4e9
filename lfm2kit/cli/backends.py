"""`lfm2kit backends`: what is installed, whether it can run here, and whether it is right."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from lfm2kit.backend import Context
from lfm2kit.cli import options
from lfm2kit.cli.console import Report, only_said, progress, tables
from lfm2kit.plugins import Plugins, installed_plugins

backends = typer.Typer(help="Lists the installed backends, or checks one.")


@backends.callback(invoke_without_command=True)
def _default(context: typer.Context, json: options.JsonOption = None) -> None:
    if context.invoked_subcommand is None:
        list_backends(json)


@backends.command("list")
def list_backends(json: options.JsonOption = None) -> None:
    """Lists backends, transports and plugins that could not be loaded, with the reason."""
    plugins = installed_plugins()
    report = Report(json)
    report.fields = _description(plugins)
    if json != "-":
        _show(report.fields)
    report.write()


@backends.command("check")
def check(
    name: Annotated[str, typer.Argument(help="The backend to judge.")],
    only: Annotated[
        str | None, typer.Option(metavar="ID,...", help="Only these checks. [default: all]")
    ] = None,
    precision: options.PrecisionOption = "fp32",
    threads: options.ThreadsOption = None,
    json: options.JsonOption = None,
) -> None:
    """Runs the conformance suite on a backend; exit code 1 if it fails."""
    from lfm2kit.testing.runner import run_checks, selected

    report = Report(json)
    plugins = installed_plugins()
    plugins.backend(name)
    ids = selected(only.split(",") if only else None)
    with progress(f"checking {name}", len(ids), "checks") as advance:
        results = run_checks(
            name, plugins, Context(precision, threads), only=ids, done=lambda _: advance(1)
        )
    table = Table(title=f"conformance of '{name}'", box=SIMPLE_HEAD)
    table.add_column("check", no_wrap=True)  # to be copied into --only
    table.add_column("verdict", no_wrap=True)
    table.add_column("detail")
    for result in results:
        table.add_row(result.id, result.verdict, result.detail)
    if json != "-":
        tables().print(table)
    failed = [result.id for result in results if result.verdict == "failed"]
    counts = {v: sum(r.verdict == v for r in results) for v in ("passed", "failed", "skipped")}
    report.line(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    report.fields = {"backend": name, **counts, "results": [r._asdict() for r in results]}
    with only_said(when=bool(failed)):
        report.write()
    if failed:
        raise typer.Exit(1)


def _description(plugins: Plugins) -> dict[str, Any]:
    return {
        "backends": [
            {
                "name": name,
                "summary": installed.plugin.summary,
                "distribution": installed.distribution,
                "api_version": installed.plugin.api_version,
                "precisions": list(installed.plugin.precisions),
                "cannot_run": installed.why_not,
            }
            for name, installed in sorted(plugins.backends.items())
        ],
        "transports": [
            {"name": name, "summary": transport.summary}
            for name, transport in sorted(plugins.transports.items())
        ],
        "broken": [
            {
                "name": broken.name,
                "distribution": broken.distribution,
                "reason": broken.reason,
                "traceback": broken.details,
            }
            for broken in plugins.broken
        ],
    }


def _show(fields: dict[str, Any]) -> None:
    console = tables()
    table = Table()
    for heading in ("backend", "what it is", "from", "precisions", "here"):
        table.add_column(heading, overflow="fold")
    for row in fields["backends"]:
        here = row["cannot_run"] or "ready"
        precisions = ", ".join(row["precisions"])
        table.add_row(row["name"], row["summary"], row["distribution"], precisions, here)
    console.print(table)
    for row in fields["transports"]:
        console.print(f"transport {row['name']}: {row['summary']}")
    for row in fields["broken"]:
        console.print(f"\nplugin '{row['name']}' ({row['distribution']}) skipped: {row['reason']}")
        console.print(row["traceback"].rstrip())
