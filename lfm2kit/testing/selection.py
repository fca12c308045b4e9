"""What `--only` selects: checks by their ids, and blocks by what their specs are.

    only  = item ("," item)*
    item  = id | block                           zero-rows
    block = name "(" [field ("," field)*] ")"    mlp(), experts(hidden_size=2048)
    field = name "=" (value | block)             layer(operator=conv(kernel_size=3))

A block's name is its kind in a plan, or the name of its spec's class, so that a spec can be copied
from a failure.  Values are Python's.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any, NamedTuple

from lfm2kit.errors import Lfm2kitError, Option, choices
from lfm2kit.specs import Spec
from lfm2kit.testing.cases import CASES, REAL_WIDTHS
from lfm2kit.testing.checks import CHECKS
from lfm2kit.testing.patterns import Pattern
from lfm2kit.testing.scope import Scope
from lfm2kit.testing.widths import Widths

TYPES: dict[str, type[Spec]] = {kind: type(some[0]) for kind, some in CASES.items()}
NAMES = TYPES | {kind.__name__: kind for kind in TYPES.values()}
FORM = "a block is written KIND(FIELD=VALUE,...), such as mlp() or mlp(hidden_size=24)"


class Selection(NamedTuple):
    """The checks to run, in order, and the patterns of blocks that they look at; () for all."""

    ids: list[str]
    patterns: tuple[Pattern, ...] = ()


def selected(only: Iterable[str] | None) -> list[str]:
    """Return the ids of the checks to run, in order; raise `Lfm2kitError` for an unknown id."""
    if only is None:
        return list(CHECKS)
    wanted = {name.strip() for name in only}
    for name in sorted(wanted):
        if name not in CHECKS:
            hint = f"; the blocks of this kind are {name}()" if name in NAMES else ""
            raise Lfm2kitError(f"unknown check '{name}'{hint}; {choices(name, CHECKS)}")
    return [name for name in CHECKS if name in wanted]


def selection(only: str | None, widths: Widths | None = None) -> Selection:
    """Return what a text selects; raise `Lfm2kitError` if it is wrong, or fits nothing.

    Blocks are those of the suite, or they in other `widths`.
    """
    items = [] if only is None else list(_items(only))
    ids = [item for item in items if "(" not in item and ")" not in item]
    patterns = tuple(_pattern(item) for item in items if item not in ids)
    for pattern in patterns:
        _require_some(pattern, widths)
    return Selection(selected(ids if ids else None), patterns)


def _items(text: str) -> Iterator[str]:
    """Yield the parts of a text between commas, but for those within parentheses."""
    depth, start = 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            yield text[start:i].strip()
            start = i + 1
    yield text[start:].strip()


def _pattern(text: str) -> Pattern:
    try:
        return _read(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        raise Lfm2kitError(Option("only", text), f": {FORM}") from None


def _read(node: ast.expr) -> Pattern:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
        raise ValueError(node)
    name = node.func.id
    if name not in NAMES:
        raise Lfm2kitError(f"unknown kind of block '{name}'; {choices(name, TYPES)}")
    of = NAMES[name]
    known = [field.name for field in fields(of)]  # type: ignore[arg-type]
    for keyword in node.keywords:
        if keyword.arg not in known:
            unknown = f"{of.__name__} has no field '{keyword.arg}'"
            raise Lfm2kitError(f"{unknown}; {choices(str(keyword.arg), known)}")
    return Pattern(of, tuple((str(one.arg), _value(one.value)) for one in node.keywords))


def _value(node: ast.expr) -> Any:
    return _read(node) if isinstance(node, ast.Call) else ast.literal_eval(node)


def _require_some(pattern: Pattern, widths: Widths | None) -> None:
    """Raise `Lfm2kitError` if the suite has no such block."""
    cases = [*CASES[pattern.type.kind], *(s for s in REAL_WIDTHS if type(s) is pattern.type)]
    there = Scope(widths=widths).candidates(cases)
    if not any(map(pattern.fits, there)):
        available = "; ".join(map(str, there))
        raise Lfm2kitError(f"no block of the suite is {pattern}; available: {available}")
