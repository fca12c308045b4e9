"""Plugins, and the pages for their authors, use no module that docs/plugins.md does not name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.plugins.pages import ROOT, files, page

PAGE = page("plugins.md")
HEADING = "### What may be imported\n"
PLUGINS = sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))
PACKAGES = {
    path.stem: path
    for path in (
        ROOT / "lfm2kit",
        *ROOT.glob("backends/*/lfm2kit_*"),
        *ROOT.glob("plugins/*/lfm2kit_*"),
    )
}
NAME = re.compile(r"\blfm2kit(?:_[a-z0-9_]+)?(?:\.\w+)*")


def public_modules() -> set[str]:
    """Return the modules of the page's list."""
    section = PAGE.partition(HEADING)[2].partition("\n#")[0]
    return set(re.findall(r"`(lfm2kit[\w.]*)`", section))


def module_of(name: str) -> str:
    """Return the module of this repository that `name`, or what `name` is in, is."""
    first, *others = name.split(".")
    path, module = PACKAGES[first], first
    for part in others:
        path /= part
        if not (path.is_dir() or path.with_suffix(".py").is_file()):
            break
        module += f".{part}"
    return module


def imported(code: str) -> Iterator[str]:
    """Yield the modules of this repository that Python code imports."""
    for node in ast.walk(ast.parse(code)):
        names = []
        if isinstance(node, ast.Import):
            names = [one.name for one in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{one.name}" for one in node.names]
        yield from (module_of(name) for name in names if name.partition(".")[0] in PACKAGES)


def imported_from_others(plugin: Path) -> set[str]:
    """Return the modules of other packages that a plugin's own one imports."""
    (package,) = plugin.glob("lfm2kit_*")
    sources = [package] if package.is_file() else sorted(package.rglob("*.py"))
    found = {name for path in sources for name in imported(path.read_text(encoding="utf-8"))}
    return {name for name in found if name.partition(".")[0] != package.stem}


def test_every_module_of_the_list_exists() -> None:
    assert len(public_modules()) > 20
    assert {name for name in public_modules() if module_of(name) != name} == set()


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda path: path.name)
def test_a_plugin_imports_public_modules_alone(plugin: Path) -> None:
    found = imported_from_others(plugin)
    assert "lfm2kit" in found  # for the marker of its hook
    assert found - public_modules() == set()


def test_authors_are_told_to_use_public_modules_alone() -> None:
    """What the page names in its text, and what its files and those of the tutorial import."""
    text = re.sub(r"^```.*?^```$", "", PAGE, flags=re.MULTILINE | re.DOTALL)
    spans = " ".join(re.findall(r"`([^`]+)`", text))
    named = {module_of(name) for name in NAME.findall(spans) if name.partition(".")[0] in PACKAGES}
    written = files(PAGE) | files(page("tutorial.md"))
    codes = [code for name, code in written.items() if name.endswith(".py")]
    used = {name for code in codes for name in imported(code)}
    assert (named | used) - public_modules() == set()
