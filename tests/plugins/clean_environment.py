"""An environment of its own, into which wheels are installed, as a user has it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


class Installed:
    """An environment's programs, run from an empty folder."""

    def __init__(self, environment: Path, folder: Path, *needs: str) -> None:
        """Make an environment that has what these need, from this one instead of an index."""
        subprocess.run(
            [sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True
        )
        (packages,) = environment.glob("lib/python*/site-packages")
        for distribution in needed(*needs):
            tops = {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}
            for top in tops:
                (packages / top).symlink_to(distribution.locate_file(top))
        self.programs = environment / "bin"
        self.folder = folder

    def install(self, wheels: Iterable[Path]) -> None:
        """Install wheels, and check that nothing is missing that they need."""
        environment = str(self.programs.parent)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", environment]
        # Python compiles a module when it is first imported, and many never are.
        own = ["install", "--quiet", "--no-compile", "--no-deps", "--no-index", *map(str, wheels)]
        for command in (own, ["check"]):
            done = subprocess.run([*pip, *command], capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, done.stdout + done.stderr

    def run(
        self, program: str, *arguments: str, cwd: Path | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("LFM2KIT_", "PYTHON"))}
        return subprocess.run(
            [str(self.programs / program), *arguments],
            cwd=cwd or self.folder,
            env={**clean, **variables},
            capture_output=True,
            text=True,
            timeout=600,
        )

    def succeeds(
        self, program: str, *arguments: str, cwd: Path | None = None, **variables: str
    ) -> str:
        """Check that a command succeeds, and return its stdout."""
        done = self.run(program, *arguments, cwd=cwd, **variables)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def needed(*requirements: str) -> list[metadata.Distribution]:
    """Return the installed distributions that these need, directly or not, without our own."""
    found: dict[str, metadata.Distribution] = {}

    def add_needs(of: Requirement) -> None:
        for line in metadata.distribution(of.name).requires or ():
            one = Requirement(line)
            extras = {"", *of.extras}
            is_wanted = one.marker is None or any(one.marker.evaluate({"extra": e}) for e in extras)
            name = canonicalize_name(one.name)  # which not all write in the same way
            if is_wanted and name not in found:
                if not name.startswith("lfm2kit"):
                    found[name] = metadata.distribution(name)
                add_needs(one)

    for requirement in requirements:
        add_needs(Requirement(requirement))
    return list(found.values())
