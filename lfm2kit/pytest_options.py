"""The pytest plugin: which backend `pytest --pyargs lfm2kit.testing` judges, and its verdicts.

A plugin rather than a conftest.py: pytest finds the conftest of a package given by `--pyargs` only
after it has read the command line, too late for an option.  Outside `lfm2kit.testing`, and light,
because every pytest of an environment loads it.
"""

from __future__ import annotations

import pytest

NOT_PROMISED = "not promised"  # how the reason of such a check begins


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lfm2kit", "conformance of lfm2kit backends")
    group.addoption("--lfm2kit-backend", metavar="NAME", help="The installed backend to judge.")
    group.addoption("--lfm2kit-precision", metavar="NAME", default="fp32", help="[default: fp32]")
    group.addoption(
        "--lfm2kit-examples",
        metavar="N",
        type=int,
        help="Random examples of each kind of block. [default: 30; 0 without hypothesis]",
    )
    group.addoption("--lfm2kit-seed", metavar="N", type=int, default=0, help="[default: 0]")
    group.addoption(
        "--lfm2kit-expected-failures",
        metavar="FILE",
        help='A TOML file of lines  check-id = "reason":  checks that must fail.',
    )


def pytest_report_header(config: pytest.Config) -> str | None:
    name = config.getoption("--lfm2kit-backend")
    if not name:
        return None
    from lfm2kit.testing.version import SUITE_VERSION

    return f"lfm2kit backend on trial: {name}, by version {SUITE_VERSION} of the suite"


@pytest.hookimpl(tryfirst=True)  # before the one that counts every expected failure
def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """Count the checks of promises that a backend takes back apart from other expected failures."""
    reason = getattr(report, "wasxfail", "").removeprefix("reason: ")  # as some versions say
    if not reason.startswith(f"{NOT_PROMISED}: "):
        return None
    return NOT_PROMISED, "n", NOT_PROMISED.upper()
