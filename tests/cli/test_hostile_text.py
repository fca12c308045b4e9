"""Whatever a path, a name or an exception is called, a command prints only what it means to."""

from __future__ import annotations

import json
import os
import shutil
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from lfm2kit.building.installed import InstalledPlugin
from lfm2kit.building.loading import EMBEDDED
from lfm2kit.building.plugins import GROUP, Plugins
from tests.checkpoint.typed import Cli, Typed

NAMES = ["x\nVALID", "\x1b[2J\x1b]0;title\x07", "\u202eDILAV\u2066", "[red]:smile:[/]", "n" * 200]
NAMES += [os.fsdecode(b"caf\xe9")]
COMMANDS = {
    "run": ["run", "-b", "reference", "-n", "1", "-v", "-m"],
    "json": ["run", "-b", "reference", "-n", "1", "--json", "-", "-m"],
    "plan": ["plan", "-b", "reference", "-m"],
    "bench": ["bench", "-b", "reference", "-n", "1", "-r", "1", "-m"],
    "csv": ["bench", "-b", "reference", "-n", "1", "-r", "1", "-o", "csv", "-m"],
    "error": ["run", "-b", "reference", "--random-inputs", "4", "--inputs", "x", "-m"],
}


@pytest.fixture(params=NAMES, ids=ascii)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(EMBEDDED / "tiny", tmp_path / request.param))


def assert_harmless(done: Typed, valid: int) -> None:
    lines = (done.out + done.err).replace("\r\n", "\n").split("\n")  # CSV's own line ends
    assert [line for line in lines if not line.isprintable()] == []
    assert sum(line.startswith("VALID") for line in lines) == valid
    assert "Traceback" not in done.err


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_prints_a_models_name_raw(command: str, model: Path, cli: Cli) -> None:
    done = cli(*COMMANDS[command], model)
    assert done.code == (2 if command == "error" else 0), done.err
    assert_harmless(done, valid=int(command == "run"))
    if command == "json":
        assert json.loads(done.out)["model"] == str(model)
    elif command in ("bench", "plan", "run") and "[red]" in model.name:
        assert "[red]:smile:[/]" in done.out


@pytest.mark.parametrize("name", NAMES, ids=ascii)
@pytest.mark.parametrize(
    "words",
    [
        ["run", "-m"],
        ["run", "--nosuch"],
        ["run", "--inputs"],
        ["run", "--backend"],
        ["run", "--plan"],
        ["run", "-n"],
        ["bench", "--block"],
        ["backends", "check"],
        ["convert", "tiny"],
        [],
    ],
    ids=" ".join,
)
def test_no_error_says_a_word_of_the_command_line_raw(
    words: list[str], name: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "n").mkdir()
    done = cli(*words, *([f"n/{name}"] if words == ["convert", "tiny"] else [name]))
    assert_harmless(done, valid=0)
    if words != ["convert", "tiny"]:
        assert done.code == 2
        assert done.err.count("\n") == 1


def test_an_error_line_has_at_most_500_characters(cli: Cli) -> None:
    (line,) = cli("run", "-m", "n" * 1_000_000).err.splitlines()
    assert line.startswith("lfm2kit: error: no model 'nnn")
    assert line.endswith("available: tiny")
    assert 490 <= len(line) <= 500


def test_the_texts_of_plugins_are_not_printed_raw(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugins = Plugins([])
    text = "odd\nVALID\x1b[2J"
    entry, details = EntryPoint(text, text, GROUP), f"Traceback:\n  raise\n{text}"
    plugins.installed.append(InstalledPlugin(entry, reason=text, traceback=details))
    for module in ("backends", "plugins"):
        monkeypatch.setattr(
            sys.modules[f"lfm2kit.cli.{module}"], "installed_plugins", lambda: plugins
        )
        assert_harmless(done := cli(module), valid=0)
    assert "    VALID\\x1b[2J" in done.out.split("\n")


def test_the_exception_of_a_bug_is_not_printed_raw(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object, **options: object) -> None:
        raise RuntimeError("x\nVALID\x1b[2J\nlfm2kit: error: another")

    monkeypatch.setattr(sys.modules["lfm2kit.cli.performing"], "run_samples", fails)
    done = cli("run", "-b", "reference", "-n", "1")
    assert done.code == 3
    assert "\x1b" not in done.err
    lines = done.err.split("\n")
    assert "  VALID\\x1b[2J" in lines
    assert [line for line in lines if line.startswith("lfm2kit: error:")] == [
        "lfm2kit: error: this is a bug, of lfm2kit or of a plugin; a report needs: lfm2kit env"
    ]


@pytest.mark.parametrize("exits", ["SystemExit(0)", "SystemExit('VALID')", "BaseException()"])
def test_a_plugin_that_exits_has_not_succeeded(
    exits: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object, **options: object) -> None:
        raise eval(exits)

    monkeypatch.setattr(sys.modules["lfm2kit.cli.performing"], "run_samples", fails)
    assert cli("run", "-b", "reference", "-n", "1").code == 3
