"""The option of commands that begin a package, and what they print at the end."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

from lfm2kit.building.options import About
from lfm2kit.cli.options import flags
from lfm2kit.cli.report import Output

INTO = About("Write the package into this new folder.", "lfm2kit-NAME", metavar="FOLDER")
IntoOption = Annotated[Path | None, flags("into", INTO, is_path=True)]


def show_package(folder: Path, what: str, *commands: str) -> None:
    """Say what a package in `folder` has, and what to type next."""
    report = Output(None)
    report.line(f"{folder} has a package with {what}. Next:")
    report.line()
    for command in (f"cd {shlex.quote(str(folder))}", "pip install -e '.[test]'", *commands):
        report.line(f"    {command}")
    report.line()
    report.line(
        "Its README.md says where to begin. There is no LICENSE yet: add one of your choice."
    )
