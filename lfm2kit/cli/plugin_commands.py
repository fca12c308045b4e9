"""The commands of plugins, beside lfm2kit's own.

Plugins are imported only if none of lfm2kit's commands is meant, or all are listed; of lfm2kit's,
only the one that is meant.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any

import typer

from lfm2kit.building.plugins import Plugins, installed_plugins
from lfm2kit.cli import own_commands
from lfm2kit.cli.console import complain
from lfm2kit.cli.help import PlainCommand, PlainGroup
from lfm2kit.errors import TRACEBACK_HINT, Lfm2kitError
from lfm2kit.hookspecs import Command

CONTEXT = {"help_option_names": ["-h", "--help"]}


class Commands(PlainGroup):
    """The group of lfm2kit's commands and those of plugins."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in own_commands.NAMES:
            self._build(cmd_name)
        elif cmd_name not in self.commands:
            self.build_own()  # the nearest name may be one of them
            self._add(installed_plugins())
        return super().get_command(ctx, cmd_name)

    def build_own(self) -> None:
        """Build all commands of lfm2kit, in the order of its help."""
        for name in own_commands.NAMES:
            self._build(name)

    def _build(self, name: str) -> None:
        if name not in self.commands:
            self.commands[name] = own_commands.built(name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except Exception as error:
            if hasattr(error, "message"):  # click's error, in whichever module it lives
                error.message = f"{error.message.rstrip('.')}{installed_plugins().skipped()}"
            raise

    def list_commands(self, ctx: Any) -> list[str]:
        self.build_own()
        with suppress(Lfm2kitError):  # a wrong list of plugins prevents no help
            self._add(installed_plugins())
        return super().list_commands(ctx)

    def _add(self, plugins: Plugins) -> None:
        for name, command in plugins.commands.items():
            self.commands[name] = _made(command, plugins.owner(name))


def _made(command: Command, owner: str) -> Any:
    """Return the command of a plugin; one that says so in place of one that Typer cannot read."""
    try:
        return _typer_command(command.name, command.run)
    except Exception as error:
        reason = f"command '{command.name}' of {owner} cannot be used: {error}{TRACEBACK_HINT}"
        cause = error

        def refuse() -> None:
            raise Lfm2kitError(reason) from cause

        refuse.__doc__ = f"Cannot be used: {owner} describes it wrongly."
        return _typer_command(command.name, refuse)


def _typer_command(name: str, run: Callable[..., None]) -> Any:
    app = typer.Typer(add_completion=False, context_settings=CONTEXT)
    app.command(name, cls=PlainCommand)(_ending(run))
    return typer.main.get_command(app)


def _ending(run: Callable[..., None]) -> Callable[..., None]:
    """Return `run` with the exit code that it asks for by `sys.exit` or `typer.Abort`.

    As in Python, `sys.exit` with a text shows the text, and the exit code is 1.
    """

    @wraps(run)
    def ending(*arguments: Any, **options: Any) -> None:
        try:
            run(*arguments, **options)
        except typer.Abort:
            complain("aborted")
            raise typer.Exit(1) from None
        except SystemExit as ended:
            if ended.code is not None and not isinstance(ended.code, int):
                complain(str(ended.code))
            raise typer.Exit(_exit_code(ended.code)) from None

    return ending


def _exit_code(code: object) -> int:
    if code is None:
        return 0
    return int(code) if isinstance(code, int) else 1
