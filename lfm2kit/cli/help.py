"""Commands and groups whose `--help` shows a flag by its name alone, without the type "bool".

They also keep what they were given, for the records of commands.
"""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

from lfm2kit.cli import given


class _Plain:
    """A mixin for Typer's commands and groups."""

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for one in params:
            if getattr(one, "is_flag", False):
                one.metavar = ""
        return params

    def invoke(self, ctx: Any) -> Any:
        with given.to(ctx):
            return super().invoke(ctx)  # type: ignore[misc]


class PlainCommand(_Plain, TyperCommand):
    """A command of lfm2kit or of a plugin."""


class PlainGroup(_Plain, TyperGroup):
    """A group of such commands."""
