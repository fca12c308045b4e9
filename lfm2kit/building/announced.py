"""Checks what plugins announce, when they are loaded: nonsense is found before it is used."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from lfm2kit import hookspecs
from lfm2kit.backend import BackendPlugin
from lfm2kit.building.plan import AUTO
from lfm2kit.checkpoint.readers import CheckpointReader
from lfm2kit.errors import choices
from lfm2kit.formats import Format
from lfm2kit.hookspecs import Command
from lfm2kit.precisions import Grade, Precision
from lfm2kit.promises import Promise
from lfm2kit.rewrites import Rewrite
from lfm2kit.transport import TransportPlugin

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
RESERVED = {AUTO, "none"}  # words that options and variables give a meaning


def check_hooks(plugin: Any) -> None:
    """Refuse a misspelt hook, and one without its mark, which pluggy would ignore in silence."""
    known = {hook.__name__ for hook in hookspecs.HOOKS}
    for name in dir(plugin):
        is_marked = hasattr(getattr(plugin, name), "lfm2kit_impl")
        if is_marked and name not in known:
            raise AttributeError(f"hook '{name}' does not exist; {choices(name, known)}")
        if name in known and not is_marked:
            raise AttributeError(f"hook '{name}' is not marked with @lfm2kit.hookimpl")


def check_announced(
    hook: str, announced: list[Any], expected: type[Any], owners: Mapping[str, str]
) -> None:
    """Check what a hook yielded: its type, and names that a plan can contain and nobody has yet."""
    owners = dict(owners)
    for plugin in announced:
        if not isinstance(plugin, expected):
            raise TypeError(f"{hook} yielded {plugin!r}, not a {expected.__name__}")
        if not isinstance(plugin.name, str) or not NAME.fullmatch(plugin.name):
            raise ValueError(
                f"{hook} yielded the name {plugin.name!r}; a name looks like my_backend"
            )
        if plugin.name in RESERVED:
            raise ValueError(f"{hook} yielded the name '{plugin.name}', which is reserved")
        if plugin.name in owners:
            raise ValueError(f"{hook} yielded '{plugin.name}', which is {owners[plugin.name]}'s")
        _check_fields(f"{hook} yielded '{plugin.name}', whose", plugin)
        owners[plugin.name] = "its own already"


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and value >= 0


def _is_launcher(value: Any) -> bool:
    return all(callable(getattr(value, n, None)) for n in ("world_size", "launch", "connect"))


def _are_joins(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(spec, type) and callable(join) for spec, join in value.items()
    )


def _are_reasons(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(promise, Promise) and isinstance(reason, str) and len(reason.splitlines()) == 1
        for promise, reason in value.items()
    )


class _Kind:
    """A test of a value, and what it asks for, in words."""

    def __init__(self, holds: Callable[[Any], bool], words: str) -> None:
        self.holds = holds
        self.words = words


TEXT = _Kind(lambda value: isinstance(value, str), "a text")
WHOLE = _Kind(_is_whole, "a whole number")
NUMBER = _Kind(_is_number, "a number of 0 or more")
TRUTH = _Kind(lambda value: isinstance(value, bool), "True or False")
FUNCTION = _Kind(callable, "a function")

FIELDS: dict[type[Any], dict[str, _Kind]] = {
    BackendPlugin: {
        "summary": TEXT,
        "create": FUNCTION,
        "api_version": WHOLE,
        "why_unavailable": FUNCTION,
        "precisions": _Kind(
            lambda value: isinstance(value, (tuple, list)) and len(value) > 0,
            "a tuple of one or more precisions",
        ),
        "preference": WHOLE,
        "not_promised": _Kind(
            _are_reasons,
            "a mapping of promises to reasons of one line, such as "
            "{Promise.BATCH_INVARIANCE: 'sums depend on the number of rows'}",
        ),
    },
    TransportPlugin: {"summary": TEXT, "launcher": _Kind(_is_launcher, "a Launcher")},
    CheckpointReader: {"summary": TEXT, "recognises": FUNCTION, "open": FUNCTION},
    Command: {"run": FUNCTION},
    Rewrite: {
        "summary": TEXT,
        "apply": FUNCTION,
        "joins": _Kind(_are_joins, "a mapping of types of specs to functions"),
        "has_state": TRUTH,
        "keeps_rows": TRUTH,
        "needs_rows": TRUTH,
        "is_automatic": TRUTH,
    },
    Precision: {
        "grade": _Kind(lambda value: isinstance(value, Grade), "a Grade"),
        "weights": _Kind(lambda value: isinstance(value, Format | None), "a Format or None"),
    },
    Grade: {
        "name": TEXT,
        "block_error": NUMBER,
        "judged_by": _Kind(lambda value: value in ("logits", "top-1"), "'logits' or 'top-1'"),
        "logit_error": NUMBER,
        "block_nmse": _Kind(
            lambda value: value is None or _is_number(value), "a number of 0 or more, or None"
        ),
    },
}


def _check_fields(whose: str, announced: Any) -> None:
    kinds = next(kinds for kind, kinds in FIELDS.items() if isinstance(announced, kind))
    for name, kind in kinds.items():
        value = getattr(announced, name)
        if not kind.holds(value):
            raise TypeError(f"{whose} {name} is {value!r}, not {kind.words}")
    if isinstance(announced, BackendPlugin):
        _check_precisions(announced)


def _check_precisions(backend: BackendPlugin) -> None:
    """Check that precisions say how results are judged, and are not only names."""
    names = set()
    for precision in backend.precisions:
        if (
            not isinstance(precision, Precision)
            or not isinstance(precision.name, str)
            or not NAME.fullmatch(precision.name)
        ):
            raise TypeError(
                f"backend '{backend.name}' announces the precision {precision!r}; "
                "write Precision('bf16', BF16_GRADE)"
            )
        whose = f"backend '{backend.name}' announces the precision '{precision.name}', whose"
        _check_fields(whose, precision)
        _check_fields(f"{whose} grade's", precision.grade)
        if precision.name in names:
            raise ValueError(f"backend '{backend.name}' announces '{precision.name}' twice")
        names.add(precision.name)
