"""lfm2kit's own commands, each in the module of its name.

A command is imported, and built for Typer, when it is meant: all of them take a tenth of a second.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer

from lfm2kit.cli.help import PlainCommand

ON_RANKS = ("run", "warmup", "calibrate", "generate")
ALONE = (
    "plan",
    "chat",
    "bench",
    "compare",
    "profile",
    "verify",
    "grade",
    "convert",
    "specs",
    "tokenize",
    "plugins",
    "env",
)
GROUPS = ("backends", "transports")
NAMES = (*ON_RANKS, *ALONE, *GROUPS)  # in the order of the help


def built(name: str) -> Any:
    """Return the command or group `name` as Typer builds it."""
    app = typer.Typer(add_completion=False)
    made = getattr(import_module(f"lfm2kit.cli.{name}"), name)
    if name in GROUPS:
        app.add_typer(made, name=name)
    else:
        app.command(cls=_class_of(name))(made)
    return typer.main.get_group(app).commands[name]


def _class_of(name: str) -> type[PlainCommand]:
    if name not in ON_RANKS:
        return PlainCommand
    from lfm2kit.cli.ranks import RanksCommand

    return RanksCommand
