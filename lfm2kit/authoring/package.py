"""Begins a package: `lfm2kit backends new NAME`, `lfm2kit transports new NAME`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Literal

import lfm2kit
from lfm2kit.backend import BackendPlugin
from lfm2kit.building.announced import NAME, RESERVED
from lfm2kit.building.plugins import installed_plugins, left_out
from lfm2kit.errors import Lfm2kitError
from lfm2kit.outputs.folders import new_folder
from lfm2kit.transport import TransportPlugin

Kind = Literal["backend", "transport"]  # the folder in `templates`
ANNOUNCED = {"backend": BackendPlugin, "transport": TransportPlugin}


def new_package(kind: Kind, name: str, folder: Path | None) -> Path:
    """Write a package with a backend or transport `name` that works, and return its folder.

    That is `folder`, or else `lfm2kit-NAME`.  Raise `Lfm2kitError`, and write nothing, if the name
    cannot be had, or the folder is there already.
    """
    _check_name(kind, name)
    module = f"lfm2kit_{name.replace('-', '_')}"
    if (taken := _why_taken(kind, name, module)) is not None:
        raise Lfm2kitError(f"the {kind} '{name}' cannot be made: {taken}; choose another name")
    into = Path(f"lfm2kit-{name}") if folder is None else folder
    if not os.path.isdir(into.parent):
        raise Lfm2kitError(f"{into}: the folder {into.parent} is not there; make it first")
    values = {"name": name, "module": module, "version": lfm2kit.__version__}
    values["variable"] = name.upper().replace("-", "_")  # of the environment
    with new_folder(into) as partial:
        for path, text in _files(kind):
            target = partial / str(path).replace(f"lfm2kit_{kind}", module)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(Template(text).substitute(values), encoding="utf-8")
    return into


def _files(kind: Kind) -> Iterator[tuple[Path, str]]:
    """Yield the files of a template, and their texts."""
    root = Path(__file__).parent / "templates" / kind
    for path in sorted(root.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:  # what installers compile
            yield path.relative_to(root), path.read_text(encoding="utf-8")


def _check_name(kind: Kind, name: str) -> None:
    """Raise `Lfm2kitError` unless the name can stand in plans and be a part of a package's name."""
    if not NAME.fullmatch(name) or name[-1] in "-_":
        raise Lfm2kitError(
            f"a {kind} cannot be called '{name}': a name has letters, digits, - and _, "
            f"begins with a letter, and ends with a letter or a digit, such as my_{kind}"
        )
    if name in RESERVED:
        raise Lfm2kitError(f"a {kind} cannot be called '{name}', which is reserved")


def _why_taken(kind: Kind, name: str, module: str) -> str | None:
    """Return who has the name already, in a sentence; None if nobody has it."""
    for one in (*installed_plugins().installed, *left_out()):
        same_kind = [a.name for a in one.announced if isinstance(a, ANNOUNCED[kind])]
        if name in (one.name, *same_kind):
            return f"the plugin '{one.name}' of {one.distribution} has this name"
    try:
        package = distribution(f"lfm2kit-{name}")
    except PackageNotFoundError:
        return f"a module {module} is installed" if find_spec(module) else None
    return f"the package {package.name} {package.version} is installed"
