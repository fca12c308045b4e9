"""The command line: one module per command, `options` for what they share."""

from __future__ import annotations

from typing import Annotated

import typer

import lfm2kit
from lfm2kit.cli.plugin_commands import CONTEXT, Commands

app = typer.Typer(
    name="lfm2kit",
    help="Run LFM2-MoE models with every block coming from a plugin.",
    epilog="To begin:  lfm2kit run -v   (the embedded model, on the best backend of this machine)",
    no_args_is_help=True,
    context_settings=CONTEXT,
    cls=Commands,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"lfm2kit {lfm2kit.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass
