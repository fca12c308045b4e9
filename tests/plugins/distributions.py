"""Small distributions with real entry points, and processes that find them on their path."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ANNOUNCES = """
    import lfm2kit

    @lfm2kit.hookimpl
    def lfm2kit_backends():
        from lfm2kit.reference.backend import ReferenceBackend
        yield lfm2kit.BackendPlugin(
            "{name}", "a twin of reference", lambda context: ReferenceBackend(), api_version=1
        )
"""


def announcing(name: str) -> str:
    """Return the source of a plugin that announces a backend `name` which works."""
    return ANNOUNCES.format(name=name)


def install(site: Path, name: str, source: str, entry_point: str = "") -> None:
    """Install the distribution `lfm2kit-{name}` 1.0 of one module, as an installer would."""
    module = f"lfm2kit_{name}"
    (site / f"{module}.py").write_text(textwrap.dedent(source))
    info = site / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: lfm2kit-{name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[lfm2kit]\n{entry_point or name} = {module}\n")


def install_project(project: Path, site: Path, wheels: Path) -> None:
    """Unpack the wheel of `project`, which amounts to installing it, without an installer."""
    zipfile.ZipFile(build_wheel(project, wheels)).extractall(site)


def build_wheel(project: Path, into: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(into)]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return max(into.glob("*.whl"), key=os.path.getmtime)


def environment(site: Path, **variables: str) -> dict[str, str]:
    """Return this environment with `site` on Python's path and only these LFM2KIT variables."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("LFM2KIT_")}
    return {**clean, "PYTHONPATH": str(site), **variables}


def lfm2kit(
    site: Path, *arguments: str, cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run `lfm2kit *arguments` in a process that finds the distributions in `site`."""
    return subprocess.run(
        [sys.executable, "-m", "lfm2kit", *arguments],
        cwd=cwd or site,
        env=environment(site, **variables),
        capture_output=True,
        text=True,
        timeout=300,
    )


def listing(site: Path, **variables: str) -> dict[str, Any]:
    """Return what `lfm2kit plugins` says of each plugin, by its name."""
    done = lfm2kit(site, "plugins", "--json", "-", **variables)
    assert done.returncode == 0, done.stderr
    return {row["name"]: row for row in json.loads(done.stdout)["plugins"]}


def added(listed: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return all that the listed plugins add of one kind, by its name, each with its plugin."""
    return {
        one["name"]: {**one, "plugin": row["name"]}
        for row in listed.values()
        for one in row["adds"]
        if one["kind"] == kind
    }
