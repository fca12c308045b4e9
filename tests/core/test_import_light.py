"""The core imports nothing heavy, and listing plugins imports none of theirs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lfm2kit

HEAVY = {"cupy", "numba", "mpi4py", "torch", "transformers"}
NOT_FOR_ALL = {
    "lfm2kit.testing",
    "lfm2kit.chat.tokenizer",
    "lfm2kit.engine.engine",
    "lfm2kit.generating.writer",
}
OPTIONAL = {"tokenizers", "jinja2"}  # imported where text is tokenized


def test_no_module_of_the_core_names_a_heavy_import() -> None:
    for path in Path(lfm2kit.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & HEAVY, path


def test_listing_the_installed_plugins_imports_nothing_heavy() -> None:
    """Nor does the command line load what only some commands need before they are typed."""
    code = (
        "import sys; from lfm2kit.building.plugins import installed_plugins; installed_plugins();"
        "import lfm2kit.cli;"
        f"print(sorted(set(sys.modules) & {HEAVY | OPTIONAL | NOT_FOR_ALL}))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert output.strip() == "[]"


def test_little_is_imported_before_signals_are_handled() -> None:
    """NumPy alone takes a tenth of a second, in which an interrupt would show a traceback."""
    code = (
        "import sys; import lfm2kit.__main__; from lfm2kit.process.interrupts import Interrupts;"
        "Interrupts._take = lambda self: print(sorted(sys.modules)) or sys.exit();"
        "lfm2kit.__main__.script()"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert "'lfm2kit.process.interrupts'" in output
    for slow in ("numpy", "typer", "rich", "pluggy", "dataclasses", "lfm2kit.errors"):
        assert f"'{slow}'" not in output


def test_the_names_of_the_package_are_there_when_they_are_used() -> None:
    for name in lfm2kit.__all__:
        assert getattr(lfm2kit, name) is not None
        assert name in dir(lfm2kit)
    with pytest.raises(AttributeError, match="'lfm2kit' has no attribute 'nosuch'"):
        lfm2kit.nosuch  # noqa: B018
