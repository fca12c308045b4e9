"""docs/hooks.md says what the source says, and no hook lacks documentation or a test."""

from __future__ import annotations

import inspect
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from lfm2kit import backend, hookspecs, specs, transport
from tests.plugins.test_public_modules import public_modules

ROOT = Path(__file__).parents[2]
HOOKS = {hook.__name__: hook for hook in hookspecs.HOOKS}
REFERENCE = runpy.run_path(str(ROOT / "scripts" / "make_hook_reference.py"))


def test_the_page_is_what_the_script_writes() -> None:
    page = (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8")
    assert page == REFERENCE["page"](), "stale: run python scripts/make_hook_reference.py"


@pytest.mark.parametrize("module", [backend, specs, transport])
def test_every_class_of_the_contract_is_on_the_page(module: object) -> None:
    page = REFERENCE["page"]()
    own = [
        c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__
    ]
    assert own
    for thing in own:
        assert f"class {thing.__name__}" in page
        assert inspect.getdoc(thing), f"{thing.__name__} has no docstring"


@pytest.mark.parametrize("section", REFERENCE["SECTIONS"], ids=lambda section: str(section[0]))
def test_each_heading_names_a_stable_module_that_has_what_is_below_it(section: Any) -> None:
    _, module, public = section
    assert public.__name__ in public_modules()
    names = {thing.__name__ for thing in REFERENCE["_definitions"](module)}
    assert names
    assert {name for name in names if not hasattr(public, name)} <= set(HOOKS)


def test_every_hook_that_is_specified_is_listed_and_nothing_else_is() -> None:
    specified = {name for name in vars(hookspecs) if name.startswith("lfm2kit_")}
    assert specified == set(HOOKS)


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_has_a_docstring_with_an_example_and_is_on_the_page(name: str) -> None:
    documentation = inspect.getdoc(HOOKS[name]) or ""
    assert f"def {name}(" in documentation, "no example plugin in the docstring"
    assert f"### {name}\n" in REFERENCE["page"]()


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_has_a_test(name: str) -> None:
    """By convention: in tests/plugins/test_hooks.py, named after the hook."""
    tests = (Path(__file__).parent / "test_hooks.py").read_text(encoding="utf-8")
    assert re.search(rf"def test_{name}_\w+\(", tests)


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_is_used_by_a_complete_plugin_of_this_repository(name: str) -> None:
    """A hook that nothing uses is a promise nobody has tried."""
    sources = [*ROOT.glob("backends/*/*/*.py"), *ROOT.glob("plugins/*/**/*.py")]
    assert any(f"def {name}(" in source.read_text(encoding="utf-8") for source in sources)
