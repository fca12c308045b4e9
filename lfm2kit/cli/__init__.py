"""The command line: one module per command, `options` for what they share."""

from __future__ import annotations

from typing import Annotated

import typer

import lfm2kit
from lfm2kit.cli.backends import backends
from lfm2kit.cli.bench import bench
from lfm2kit.cli.calibrate import calibrate
from lfm2kit.cli.chat import chat
from lfm2kit.cli.compare import compare
from lfm2kit.cli.convert import convert
from lfm2kit.cli.env import env
from lfm2kit.cli.generate import generate
from lfm2kit.cli.grade import grade
from lfm2kit.cli.help import PlainCommand
from lfm2kit.cli.plan import plan
from lfm2kit.cli.plugin_commands import CONTEXT, Commands
from lfm2kit.cli.plugins import plugins
from lfm2kit.cli.profile import profile
from lfm2kit.cli.ranks import RanksCommand
from lfm2kit.cli.run import run
from lfm2kit.cli.specs import specs
from lfm2kit.cli.tokenize import tokenize
from lfm2kit.cli.transports import transports
from lfm2kit.cli.verify import verify
from lfm2kit.cli.warmup import warmup

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
for ranked in (run, warmup, calibrate, generate):
    app.command(cls=RanksCommand)(ranked)
app.command(cls=PlainCommand)(plan)
app.add_typer(backends, name="backends")
app.add_typer(transports, name="transports")
for command in (
    chat,
    bench,
    compare,
    profile,
    verify,
    grade,
    convert,
    specs,
    tokenize,
    plugins,
    env,
):
    app.command(cls=PlainCommand)(command)


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
