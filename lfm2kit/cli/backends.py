"""`lfm2kit backends`: what is installed, whether it can run here, and whether it is right."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any

import typer
from rich.table import Column

from lfm2kit.backend import Context
from lfm2kit.building.options import About, Options
from lfm2kit.building.plugins import InstalledBackend, installed_plugins
from lfm2kit.cli.asked import Asked
from lfm2kit.cli.console import STDOUT, show_table
from lfm2kit.cli.help import PlainCommand, PlainGroup
from lfm2kit.cli.new_package import IntoOption, show_package
from lfm2kit.cli.options import OF_RANKS, JsonOption, Without, flags, spread
from lfm2kit.cli.report import Report
from lfm2kit.errors import Lfm2kitError, choices

ABOUT = {field.name: field.metadata["about"] for field in fields(Options)}

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
    "check",
)

SeedOption = Annotated[
    int, flags("seed", About("Draw other random inputs than those of 0.", least=0))
]

ThreadsOption = Annotated[int | None, flags("threads", ABOUT["threads"])]
ExamplesOption = Annotated[
    int | None,
    flags(
        "examples",
        About(
            "Draw N random examples of each kind of block.",
            "30; 0 with --model, and where hypothesis is not installed",
            least=0,
        ),
    ),
]

ModelOption = Annotated[
    str | None,
    flags(
        "model",
        About(
            "Judge blocks of this model's widths: one that `lfm2kit specs` takes. A layer has few "
            "experts then.",
            "small and odd widths, and those of LFM2-8B-A1B",
            metavar="MODEL",
        ),
    ),
]

backends = typer.Typer(cls=PlainGroup, help="List the installed backends, check one, or begin one.")


@backends.callback(invoke_without_command=True)
def _default(context: typer.Context, json: JsonOption = None) -> None:
    if context.invoked_subcommand is None:
        list_backends(json)


@backends.command("list", cls=PlainCommand)
def list_backends(json: JsonOption = None) -> None:
    """List the backends that plugins add, and whether each can run here."""
    plugins = installed_plugins()
    report = Report(json, "lfm2kit backends list")
    report.fields = {"backends": [_description(*item) for item in sorted(plugins.backends.items())]}
    if json != STDOUT:
        _show(report.fields["backends"])
    for unused in (*plugins.broken, *plugins.silent):
        report.line(f"plugin '{unused.name}' is not used; see lfm2kit plugins")
    report.write()


@backends.command("check", cls=PlainCommand)
@spread
def check(
    options: Annotated[Options, Without(OF_A_MODEL)],
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="The backend to check.")
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="ID|SPEC,...",
            help="Run only these checks, or look only at blocks such as "
            "'experts()' or 'attn(head_dim=6)'. \\[default: all]",
        ),
    ] = None,
    seed: SeedOption = 0,
    examples: ExamplesOption = None,
    model: ModelOption = None,
    is_list: Annotated[bool, typer.Option("--list", help="List the checks; run none.")] = False,
    explain: Annotated[
        str | None, typer.Option(metavar="ID", help="Say what a check guards; run none.")
    ] = None,
    json: JsonOption = None,
) -> None:
    """Run the conformance suite on a backend, and exit with code 1 if it fails."""
    from lfm2kit.cli.suite import explain_check, judge, show_checks

    which = " --list" if is_list else " --explain" if explain is not None else ""
    report = Report(json, f"lfm2kit backends check{which}")
    plugins = installed_plugins()
    if name is not None:
        plugins.backend(name)
    if is_list and explain is not None:
        raise Lfm2kitError("--list and --explain do not go together")
    if is_list:
        show_checks(report)
    elif explain is not None:
        explain_check(report, explain)
    elif name is None:
        raise Lfm2kitError(f"no backend is named; {choices('', plugins.backends)}")
    else:
        context = Context(options.precision, options.threads)
        judge(report, name, context, Asked(only, seed, examples, model))


@backends.command("matrix", cls=PlainCommand)
def matrix(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The backend to describe.")],
    precision: Annotated[
        str | None,
        flags("precision", About("Only this precision.", "all that it has", metavar="NAME")),
    ] = None,
    threads: ThreadsOption = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print Markdown, to be published.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Run the suite in each precision, and show which blocks are built, judged, or failed."""
    from lfm2kit.cli.matrix import show_matrix

    report = Report(json, "lfm2kit backends matrix")
    if markdown and json == STDOUT:
        raise Lfm2kitError("--markdown and --json - do not go together: both go to stdout")
    plugin = installed_plugins().backend(name)
    names = [one.name for one in plugin.precisions] if precision is None else [precision]
    show_matrix(report, name, [Context(one, threads) for one in names], markdown)


@backends.command("new", cls=PlainCommand)
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The name of your backend.")],
    into: IntoOption = None,
) -> None:
    """Begin a package with a backend of your own, which passes the conformance suite."""
    from lfm2kit.authoring.package import new_package

    show_package(
        new_package("backend", name, into),
        f"the backend '{name}', which builds dense feed-forwards and experts",
        f"lfm2kit backends check {name}",
        f"lfm2kit run --backend reference,mlp={name},experts={name} -v",
    )


def _description(name: str, installed: InstalledBackend) -> dict[str, Any]:
    return {
        "name": name,
        "summary": installed.plugin.summary,
        "distribution": installed.distribution,
        "api_version": installed.plugin.api_version,
        "precisions": [precision.name for precision in installed.plugin.precisions],
        "cannot_run": installed.why_not,
    }


def _show(backends: list[dict[str, Any]]) -> None:
    headings = ("backend", "what it is", "from", "precisions", "here")
    rows = [
        (row["name"], row["summary"], row["distribution"], ", ".join(row["precisions"]), here)
        for row in backends
        for here in [row["cannot_run"] or "ready"]
    ]
    show_table(rows, *(Column(heading, overflow="fold") for heading in headings))
