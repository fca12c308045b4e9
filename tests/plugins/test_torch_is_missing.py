"""The wheel of lfm2kit-torch where PyTorch is not installed, as in this environment."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.plugins.distributions import added, install_project, lfm2kit, listing

pytestmark = [
    pytest.mark.wheels,
    pytest.mark.skipif(find_spec("torch") is not None, reason="PyTorch is installed"),
]

PROJECT = Path(__file__).parents[2] / "plugins" / "lfm2kit-torch"
SENTENCE = "PyTorch is not installed; pip install torch"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the plugin and nothing that it needs."""
    site = tmp_path_factory.mktemp("site")
    install_project(PROJECT, site, tmp_path_factory.mktemp("wheels"))
    return site


def test_the_wheel_holds_its_package_alone(site: Path) -> None:
    assert {path.name for path in site.iterdir()} == {
        "lfm2kit_torch",
        "lfm2kit_torch-0.1.0.dist-info",
    }


def test_the_plugin_is_loaded_and_adds_both_backends(site: Path) -> None:
    backends = added(listing(site), "backend")
    assert {name for name, one in backends.items() if one["plugin"] == "torch"} == {
        "torch",
        "torch-cuda",
    }


def test_backends_that_cannot_run_say_what_to_type(site: Path) -> None:
    done = lfm2kit(site, "backends", "--json", "-")
    reasons = {row["name"]: row["cannot_run"] for row in json.loads(done.stdout)["backends"]}
    assert reasons["torch"] == reasons["torch-cuda"] == SENTENCE


def test_a_plan_with_one_is_refused_in_one_line(site: Path) -> None:
    done = lfm2kit(site, "run", "--backend", "reference,moe=torch")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("lfm2kit: error: ")
    assert SENTENCE in line
