"""`lfm2kit backends`: what is installed, whether it can run here, and whether it is right."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Column

from lfm2kit.backend import Context
from lfm2kit.building.options import Options
from lfm2kit.building.plugins import Plugins, installed_plugins
from lfm2kit.cli.console import Report, progress, show_table
from lfm2kit.cli.help import PlainCommand, PlainGroup
from lfm2kit.cli.options import OF_RANKS, JsonOption, Without, spread
from lfm2kit.text import indented

# The options that say which model is set up; a check makes its own.
OF_A_MODEL = (
    "model",
    "backend",
    "plan",
    "n_cpu_moe",
    "gpu_memory",
    "streamed_experts",
    "rates",
    "load",
    *OF_RANKS,
    "rewrites",
    "seed",
)

backends = typer.Typer(cls=PlainGroup, help="List the installed backends, or check one.")


@backends.callback(invoke_without_command=True)
def _default(context: typer.Context, json: JsonOption = None) -> None:
    if context.invoked_subcommand is None:
        list_backends(json)


@backends.command("list", cls=PlainCommand)
def list_backends(json: JsonOption = None) -> None:
    """List everything that plugins add, and why plugins could not be loaded."""
    plugins = installed_plugins()
    report = Report(json)
    report.fields = _description(plugins)
    if json != "-":
        _show(report)
    report.write()


@backends.command("check", cls=PlainCommand)
@spread
def check(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The backend to check.")],
    options: Annotated[Options, Without(OF_A_MODEL)],
    only: Annotated[
        str | None, typer.Option(metavar="ID,...", help="Run only these checks. \\[default: all]")
    ] = None,
    json: JsonOption = None,
) -> None:
    """Run the conformance suite on a backend, and exit with code 1 if it fails."""
    from lfm2kit.cli.verdicts import conclude
    from lfm2kit.testing.runner import run_checks, selected

    report = Report(json)
    plugins = installed_plugins()
    plugins.backend(name)
    ids = selected(None if only is None else only.split(","))
    with progress(f"checking {name}", len(ids), "checks") as advance:
        context = Context(options.precision, options.threads)
        results = run_checks(name, plugins, context, only=ids, done=lambda _: advance(1))
    conclude(report, "backend", name, results)


def _description(plugins: Plugins) -> dict[str, Any]:
    return {
        "backends": [
            {
                "name": name,
                "summary": installed.plugin.summary,
                "distribution": installed.distribution,
                "api_version": installed.plugin.api_version,
                "precisions": [precision.name for precision in installed.plugin.precisions],
                "cannot_run": installed.why_not,
            }
            for name, installed in sorted(plugins.backends.items())
        ],
        "transports": [
            {"name": name, "summary": transport.summary}
            for name, transport in sorted(plugins.transports.items())
        ],
        "readers": [
            {
                "name": name,
                "summary": reader.plugin.summary,
                "distribution": reader.distribution,
            }
            for name, reader in sorted(plugins.readers.items())
        ],
        "rewrites": [
            {"name": name, "summary": rewrite.summary, "automatic": rewrite.is_automatic}
            for name, rewrite in plugins.rewrites().items()
        ],
        "commands": [
            {"name": name, "distribution": plugins.owner(name)} for name in sorted(plugins.commands)
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


def _show(report: Report) -> None:
    headings = ("backend", "what it is", "from", "precisions", "here")
    rows = [
        (row["name"], row["summary"], row["distribution"], ", ".join(row["precisions"]), here)
        for row in report.fields["backends"]
        for here in [row["cannot_run"] or "ready"]
    ]
    show_table(rows, *(Column(heading, overflow="fold") for heading in headings))
    for row in report.fields["transports"]:
        report.line(f"transport {row['name']}: {row['summary']}")
    for row in report.fields["readers"]:
        report.line(f"reader {row['name']}: {row['summary']} (from {row['distribution']})")
    for row in report.fields["rewrites"]:
        report.line(f"rewrite {row['name']}: {row['summary']}")
    for row in report.fields["commands"]:
        report.line(f"command {row['name']}: {row['distribution']}")
    for row in report.fields["broken"]:
        report.line()
        report.line(f"plugin '{row['name']}' ({row['distribution']}) skipped: {row['reason']}")
        for line in indented(row["traceback"]):
            report.line(line)
