"""docs/structure.md has one line for each module of the core, and none for what is gone."""

from __future__ import annotations

import re
from pathlib import Path

import lfm2kit

CORE = Path(lfm2kit.__file__).parent
PAGE = Path(__file__).parents[2] / "docs" / "structure.md"


def test_every_module_has_one_line() -> None:
    table = PAGE.read_text().partition("## Around it")[0]
    first_cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = [name for cell in first_cells for name in re.findall(r"`([^`]+)`", cell)]
    folders = {f"{path.parent.name}/" for path in CORE.glob("*/__init__.py")} | {"models/tiny/"}
    modules = {path.name for path in CORE.glob("*.py")} - {"__init__.py"}
    assert sorted(named) == sorted(modules | folders)
