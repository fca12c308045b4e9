"""Judges the backend that `--lfm2kit-backend` names, in `pytest --pyargs lfm2kit.testing`."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from lfm2kit.backend import Context
from lfm2kit.building.plugins import installed_plugins
from lfm2kit.errors import Lfm2kitError, Option
from lfm2kit.testing.parametrize import backend_cases
from lfm2kit.testing.scope import Scope, examples_here

USAGE = "which backend? pytest --pyargs lfm2kit.testing --lfm2kit-backend NAME"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    backend = config.getoption("--lfm2kit-backend", default=None)
    if backend is None:
        raise pytest.UsageError(USAGE)
    try:
        precision = config.getoption("--lfm2kit-precision")
        installed_plugins().creator(Context(precision))(backend)  # refuses now, not in every test
        expected = _expected_failures(config.getoption("--lfm2kit-expected-failures"))
        scope = Scope(
            config.getoption("--lfm2kit-seed"),
            examples_here(config.getoption("--lfm2kit-examples")),
        )
        cases = backend_cases(backend, expected, precision, scope)
    except Lfm2kitError as error:
        raise pytest.UsageError(error.sentence(_option)) from None
    metafunc.parametrize("check", cases)


def test_backend(check: Callable[[], None]) -> None:
    check()


def _option(option: Option) -> str:
    return f"--lfm2kit-{option.name} {option.value}"


def _expected_failures(file: str | None) -> dict[str, str]:
    if file is None:
        return {}
    try:
        table = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Lfm2kitError(f"{file}: not a readable TOML file: {error}") from None
    for name, reason in table.items():
        if not isinstance(reason, str):
            raise Lfm2kitError(f'{file}: {name} is {reason!r}; expected {name} = "reason"')
    return table
