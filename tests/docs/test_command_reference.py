"""docs/commands.md says what the source says, and has each command with each of its options."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from lfm2kit.building.plugins import COMMANDS
from lfm2kit.cli import app

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "make_command_reference.py"))


def commands(prefix: str, found: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield each command, and each of those in it, by what a user types."""
    for name, command in found.items():
        yield f"{prefix} {name}", command
        yield from commands(f"{prefix} {name}", getattr(command, "commands", {}))


GROUP: Any = typer.main.get_command(app)
GROUP.build_own()
SHOWN = dict(commands("lfm2kit", SCRIPT["visible"](GROUP)))


def test_the_page_is_what_the_script_writes() -> None:
    assert SCRIPT["page"]() == PAGE, "stale: run python scripts/make_command_reference.py"


def test_each_command_has_a_section_and_a_line_in_the_list() -> None:
    assert set(COMMANDS) <= {typed.split()[1] for typed in SHOWN}
    assert re.findall(r"^##+ `(.+)`$", PAGE, re.MULTILINE) == list(SHOWN)
    assert re.findall(r"^ *- \[`(.+)`\]", PAGE, re.MULTILINE) == list(SHOWN)


def test_each_option_is_in_the_section_of_its_command() -> None:
    sections = dict(re.findall(r"^##+ `(.+?)`\n(.*?)(?=^##|\Z)", PAGE, re.DOTALL | re.MULTILINE))
    for typed, command in SHOWN.items():
        lines = re.findall(r"^\* `(.+?)`", sections[typed], re.MULTILINE)
        shown = {word for line in lines for word in re.findall(r"(?<!\S)-[\w-]+", line)}
        taken = {name for one in command.params for name in (*one.opts, *one.secondary_opts)}
        assert {name for name in taken if name.startswith("-")} <= shown, typed
