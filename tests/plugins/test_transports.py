"""The plugin of the chosen transport is loaded before all others, and alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from lfm2kit.building.plugins import ALLOW_LIST, find_transport
from lfm2kit.errors import Lfm2kitError

Install = Callable[..., None]
ANNOUNCES = """
import lfm2kit

class Launcher:
    def world_size(self): ...
    def launch(self, ranks, arguments): ...
    def connect(self): ...

@lfm2kit.hookimpl
def lfm2kit_transports():
    yield lfm2kit.TransportPlugin("pigeon", "slow but sure", launcher=Launcher())
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Make these sources, by entry point, all the plugins that are installed."""

    def install(**sources: str) -> None:
        entries = []
        for name, source in sources.items():
            (tmp_path / f"transports_{name}.py").write_text(source)
            monkeypatch.delitem(sys.modules, f"transports_{name}", raising=False)
            entries.append(EntryPoint(name, f"transports_{name}", "lfm2kit"))
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setattr("lfm2kit.building.plugins._installed", lambda: entries)

    return install


def test_no_other_plugin_is_imported(install: Install) -> None:
    install(bomb="raise SystemExit('imported')", pigeon=ANNOUNCES)
    assert find_transport("pigeon").name == "pigeon"
    assert "transports_pigeon" in sys.modules
    assert "transports_bomb" not in sys.modules


def test_the_list_of_plugins_does_not_hide_it(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(pigeon=ANNOUNCES)
    monkeypatch.setenv(ALLOW_LIST, "none")
    assert find_transport("pigeon").name == "pigeon"


def test_an_entry_point_of_another_name_is_found_too(install: Install) -> None:
    install(post=ANNOUNCES)
    assert find_transport("pigeon").name == "pigeon"


def test_a_broken_one_is_told_with_the_reason(install: Install) -> None:
    install(pigeon="import a_module_that_is_not_there")
    with pytest.raises(Lfm2kitError, match=r"its plugin is broken: .*a_module_that_is_not_there"):
        find_transport("pigeon")


def test_an_unknown_one_is_told_with_the_nearest(install: Install) -> None:
    install(pigeon=ANNOUNCES)
    with pytest.raises(Lfm2kitError, match=r"unknown transport 'pidgeon'.*'pigeon'\?"):
        find_transport("pidgeon")
