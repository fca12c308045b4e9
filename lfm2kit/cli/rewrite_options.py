"""The options that choose rewrites: a flag for each of lfm2kit's own, --rewrite for plugins'.

Plugins' rewrites have no flags of their own: a job's ranks read their command lines before they
load plugins.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Annotated, Any

import typer

from lfm2kit.errors import Lfm2kitError
from lfm2kit.rewrites import Rewrite, built_in
from lfm2kit.transport import World

FLAGS = {r.name: r.summary for r in built_in(World(), None) if not r.is_automatic}


def chosen(values: dict[str, Any]) -> tuple[str, ...]:
    """Return the rewrites that these options choose, whose values it takes out of `values`."""
    flags = [name for name in FLAGS if values.pop(_parameter(name))]
    others = values.pop("rewrite") or []
    if "" in others:
        raise Lfm2kitError("--rewrite '': expected a name; `lfm2kit plugins` lists them")
    return (*flags, *others)


def option_of(rewrite: str) -> str:
    """Return what the user types for a rewrite: "--NAME", or "--rewrite NAME"."""
    return f"--{rewrite}" if rewrite in FLAGS else f"--rewrite {rewrite}"


def check_state(option: str, rewrites: Iterable[Rewrite]) -> None:
    """Raise `Lfm2kitError` if a model with these rewrites has no state, which `option` needs."""
    for rewrite in rewrites:
        if not rewrite.has_state:
            raise Lfm2kitError(
                f"{option} needs a state; {option_of(rewrite.name)} works on whole samples only"
            )


def settled(rewrites: Iterable[str]) -> dict[str, object]:
    """Return the value of each of these options, by its name."""
    others = [name for name in rewrites if name not in FLAGS]
    flags = {f"--{name}": name in rewrites for name in FLAGS}
    return {**flags, "--rewrite": ",".join(others) or None}


def parameters() -> list[inspect.Parameter]:
    """Return the parameters that Typer makes these options of."""
    flags = [_option(name, bool, False, summary) for name, summary in FLAGS.items()]
    summary = "A plugin's rewrite, as `lfm2kit plugins` lists it; repeat the option for several."
    return [*flags, _option("rewrite", list[str] | None, None, summary, metavar="NAME")]


def _option(name: str, kind: Any, default: Any, summary: str, **more: Any) -> inspect.Parameter:
    option = typer.Option(f"--{name}", help=summary, **more)
    return inspect.Parameter(
        _parameter(name),
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, option],
    )


def _parameter(name: str) -> str:
    return name.replace("-", "_")
