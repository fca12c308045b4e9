"""docs/testing.md lists every check, and every option of the commands."""

from __future__ import annotations

import inspect
import re
import runpy
from pathlib import Path

import pytest

from lfm2kit.pytest_options import pytest_addoption
from lfm2kit.testing import CHECKS, parametrize_backend_checks
from tests.checkpoint.typed import Cli

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
REFERENCE = runpy.run_path(str(ROOT / "scripts" / "make_check_reference.py"))


def test_the_page_is_what_the_script_writes() -> None:
    assert REFERENCE["page"]() == PAGE, "stale: run python scripts/make_check_reference.py"


def test_every_check_is_on_the_page_with_all_that_it_says() -> None:
    flat = " ".join(PAGE.split())
    for check in CHECKS.values():
        assert f"- `{check.id}`: {' '.join(check.documentation.split())}" in flat


def test_every_option_of_pytest_is_on_the_page() -> None:
    options = pytest.Parser(_ispytest=True)
    pytest_addoption(options)
    names = [name for group in options._groups for one in group.options for name in one.names()]
    assert len(names) == 5
    assert [name for name in names if name not in PAGE] == []


def test_every_argument_of_the_decorator_is_on_the_page() -> None:
    arguments = list(inspect.signature(parametrize_backend_checks).parameters)[1:]
    assert arguments
    assert [name for name in arguments if f"`{name}=" not in PAGE] == []


def test_every_option_of_the_command_is_on_the_page(cli: Cli) -> None:
    options = re.findall(r"(--[a-z]+) ", cli("backends", "check", "--help").out)
    assert {"--only", "--examples", "--json"} < set(options)
    assert {name for name in options if f"{name} " not in PAGE} == {"--help"}
