"""Commands and groups whose `--help` shows a flag by its name alone, without the type "bool"."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup


class _PlainFlags:
    """A mixin for Typer's commands and groups."""

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for one in params:
            if getattr(one, "is_flag", False):
                one.metavar = ""
        return params


class PlainCommand(_PlainFlags, TyperCommand):
    """A command of lfm2kit or of a plugin."""


class PlainGroup(_PlainFlags, TyperGroup):
    """A group of such commands."""
