"""What `--help` shows: what to type, and not the types of Python."""

from __future__ import annotations

import sys

import pytest

from lfm2kit.__main__ import main
from lfm2kit.building.plugins import COMMANDS


def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["lfm2kit", *words, "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    ["", *sorted(COMMANDS), *(f"backends {one}" for one in ("list", "check", "new")),
     "transports check", "transports new"],
)  # fmt: skip
def test_flags_and_options_show_what_to_type(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, options = shown(monkeypatch, capsys, *words.split()).split("─ Options ─")
    for kind in ("<bool>", "<str>", "<path>", "<int>", "<list", "--no-"):
        assert kind not in options


def test_the_commands_of_plugins_show_flags_alike(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lfm2kit_trace", reason="it brings a command")
    assert "<bool>" not in shown(monkeypatch, capsys, "trace-summary")
