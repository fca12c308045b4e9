"""The oldest versions of other packages that lfm2kit says it works with: with these, it does."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
PROJECTS = (ROOT, ROOT / "backends" / "cpu_simd")
EXTRAS = ("chat", "testing")
OF_TESTS = ("jsonschema==4.20", "pytest-timeout", "pytest-xdist")


def oldest() -> Iterator[str]:
    """Yield what the projects need, each in the oldest version that they allow."""
    for folder in PROJECTS:
        project: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        extras = project.get("optional-dependencies", {})
        lines = [project["dependencies"], *(extras.get(extra, []) for extra in EXTRAS)]
        for one in map(Requirement, chain(*lines)):
            for specifier in one.specifier:
                if specifier.operator == ">=":
                    yield f"{one.name}=={specifier.version}"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of an environment that has the oldest versions."""
    environment = tmp_path_factory.mktemp("oldest")
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = environment / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*pip, *oldest(), *OF_TESTS], capture_output=True, text=True, timeout=900)
    if "No matching distribution" in done.stderr:
        pytest.skip("no package index offers these versions")
    assert done.returncode == 0, done.stderr
    ours = [word for folder in PROJECTS for word in ("--editable", str(folder))]
    subprocess.run([*pip, "--no-deps", *ours], check=True, timeout=900)
    return python


@pytest.mark.parametrize(
    "tests",
    ["cli/test_results.py", "cli/test_words.py", "records/test_report.py", "building", "chat"],
)
def test_tests_pass_with_the_oldest_versions_that_are_allowed(tests: str, python: Path) -> None:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("LFM2KIT_", "PYTEST_"))}
    chosen = ["-m", "not long and not mpi", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [str(python), "-m", "pytest", "-q", *chosen, str(ROOT / "tests" / tests)],
        capture_output=True, text=True, timeout=1800, cwd=ROOT, env=clean,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
