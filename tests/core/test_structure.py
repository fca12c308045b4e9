"""docs/structure.md names each module and folder of the core, and nothing that is gone."""

from __future__ import annotations

import re
from pathlib import Path

import lfm2kit

CORE = Path(lfm2kit.__file__).parent
PAGE = Path(__file__).parents[2] / "docs" / "structure.md"
TABLES = PAGE.read_text().partition("## Around it")[0]


def test_every_module_and_folder_has_one_line() -> None:
    first_cells = [line.split("|")[1] for line in TABLES.splitlines() if line.startswith("| `")]
    named = [name for cell in first_cells for name in re.findall(r"`([^`]+)`", cell)]
    folders = {f"{path.parent.name}/" for path in CORE.glob("*/__init__.py")} | {"models/tiny/"}
    modules = {path.name for path in CORE.glob("*.py")} - {"__init__.py"}
    building = {f"building/{path.name}" for path in (CORE / "building").glob("[!_]*.py")}
    assert sorted(named) == sorted(modules | building | folders - {"building/"})


def test_the_modules_of_small_folders_are_named() -> None:
    for folder in ("measuring", "outputs", "ranks", "process"):
        line = next(line for line in TABLES.splitlines() if line.startswith(f"| `{folder}/`"))
        modules = {path.stem for path in (CORE / folder).glob("[!_]*.py")}
        assert modules <= set(re.findall(r"`([^`]+)`", line)), folder
