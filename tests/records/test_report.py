"""What every record says before its own fields, and the figures after them."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

import lfm2kit
from lfm2kit import Lfm2kitError
from lfm2kit.backend import Context
from lfm2kit.cli import plugin_commands
from lfm2kit.cli.options import JsonOption
from lfm2kit.records import Figure, Report, values
from lfm2kit.records.machine import described
from lfm2kit.reference.backend import ReferenceBackend
from tests.checkpoint.typed import Cli
from tests.plugins.test_hooks import load as load


def weave(
    threads: int = 1,
    token: Annotated[str, typer.Option(hide_input=True, prompt=False)] = "",
    pattern: Annotated[str, typer.Option(envvar="WEAVE_PATTERN")] = "twill",
    json: JsonOption = None,
) -> None:
    """Weave."""
    report = Report(json, "loom weave", version=3)
    report.fields = {"pattern": pattern, "tension": float("nan")}
    report.figure("time", "s", [0.5, 0.25], "lower")
    report.figure("knots", "knots", [12])
    report.figure("not measured", "s", [None, float("inf")])
    report.write()


@pytest.fixture
def woven(load: Any, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the command of a plugin, and return its record."""

    @lfm2kit.hookimpl
    def lfm2kit_commands() -> Any:
        yield lfm2kit.Command("weave", weave)

    plugins = load(lfm2kit_commands)
    monkeypatch.setattr(plugin_commands, "installed_plugins", lambda: plugins)

    def run(*words: object) -> Any:
        done = cli("weave", *words, "--json", "-")
        assert done.code == 0, done
        return json.loads(done.out)

    return run


def test_a_plugin_writes_a_record_by_the_same_door(woven: Any) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    record = woven()
    assert list(record)[:5] == ["kind", "version", "date", "machine", "options"]
    assert (record["kind"], record["version"], record["options"]) == ("loom weave", 3, {})
    assert before <= datetime.fromisoformat(record["date"]) <= datetime.now(UTC)
    assert record["machine"] == described(Context())
    assert (record["pattern"], record["tension"]) == ("twill", None)
    assert record["figures"] == [
        {"name": "time", "unit": "s", "better": "lower", "values": [0.5, 0.25]},
        {"name": "knots", "unit": "knots", "better": None, "values": [12]},
    ]


def test_options_are_those_that_were_given_and_no_secret(
    woven: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert woven("--threads", 1)["options"] == {"--threads": 1}
    monkeypatch.setenv("WEAVE_PATTERN", "satin")
    assert woven("--token", "sesame")["options"] == {"--pattern": "satin"}


def test_options_of_our_commands_are_named_as_they_are_typed(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LFM2KIT_BACKEND", "reference")
    record = tmp_path / "record.json"
    words = ("-ncmoe", 0, "--ranks", 2, "--trim", "--tokens", 9)
    assert cli("plan", *words, "--json", record).code == 0
    asked = {"--n-cpu-moe": 0, "--ranks": 2, "--trim": True, "--tokens": 9}
    assert json.loads(record.read_text())["options"] == {"--backend": "reference", **asked}
    done = cli("tokenize", "--json", "-", "--chat", "--special", "é")
    assert json.loads(done.out)["options"] == {"TEXT": "é", "--special": True, "--chat": True}


def test_outside_a_command_nothing_was_given(capsys: pytest.CaptureFixture[str]) -> None:
    Report("-", "loom weave").write()
    assert json.loads(capsys.readouterr().out)["options"] == {}


def test_a_field_of_every_record_cannot_be_a_commands_own() -> None:
    report = Report(None, "loom weave")
    report.fields = {"machine": "a loom"}
    with pytest.raises(ValueError, match="every record has a field 'machine'"):
        report.record()
    report.figure("time", "s", [1.0])
    with pytest.raises(ValueError, match="there is a figure 'time' already"):
        report.figure("time", "s", [2.0])


def test_a_figure_that_is_not_there_is_named() -> None:
    record = {"kind": "loom weave", "figures": [Figure.of("time", "s", [2.0]).document()]}
    assert values(record, "time") == [2.0]
    with pytest.raises(Lfm2kitError, match=r"loom weave: there is no figure 'tine'.*time"):
        values(record, "tine")


LOOM = {"device": "a loom"}


class OnALoom(ReferenceBackend):
    def hardware(self) -> dict[str, str]:
        return LOOM


COMMANDS = (
    ("plan", "--backend", "reference"),
    ("run", "--backend", "reference", "-n", 1),
    ("bench", "--backend", "reference", "-n", 1, "-r", 1),
    ("backends", "check", "reference", "--only", "norm"),
)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: " ".join(map(str, words[:2])))
def test_the_machine_has_the_devices_that_backends_name(
    command: tuple[object, ...], cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lfm2kit.reference.backend.ReferenceBackend", OnALoom)
    done = cli(*command, "--threads", 1, "--json", "-")
    machine = json.loads(done.out)["machine"]
    assert machine == {**described(Context("fp32", 1)), "devices": {"reference": LOOM}}
    assert machine["threads"] == "1"
