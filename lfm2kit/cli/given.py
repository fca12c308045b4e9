"""The options that the command in progress was given, by typing them or by the environment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from pathlib import PurePath
from typing import Any

SOURCES = ("COMMANDLINE", "ENVIRONMENT")
LEFT_OUT = ("json",)  # where a record goes says nothing about what is in it

_context: ContextVar[Any] = ContextVar("context", default=None)


@contextmanager
def to(context: Any) -> Iterator[None]:
    """Take the options inside from this context of Typer's."""
    token = _context.set(context)
    try:
        yield
    finally:
        _context.reset(token)


def options() -> dict[str, Any]:
    """Return what was given, by the words to type; {} outside a command.

    What is typed without being shown (`hide_input`) is a secret, and not among them.
    """
    context = _context.get()
    if context is None:
        return {}
    return {
        _words(one): _plain(context.params[one.name])
        for one in context.command.params
        if one.name in context.params and _is_given(context, one)
    }


def _is_given(context: Any, parameter: Any) -> bool:
    if parameter.name in LEFT_OUT or getattr(parameter, "hide_input", False):
        return False
    source = context.get_parameter_source(parameter.name)
    return source is not None and source.name in SOURCES


def _words(parameter: Any) -> str:
    """Return an option's longest name, or an argument's in capitals, as the help shows it."""
    names: list[str] = parameter.opts
    is_argument = parameter.param_type_name == "argument"
    return names[0].upper() if is_argument else max(names, key=len)


def _plain(value: Any) -> Any:
    """Return an option's value as JSON can have it."""
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, PurePath):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
