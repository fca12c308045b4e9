"""`lfm2kit env`: what a bug report should say about the machine and the installation."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lfm2kit.building.byte_counts import size
from lfm2kit.building.options import BACKEND_VARIABLE
from lfm2kit.building.plugins import ALLOW_LIST, installed_plugins
from lfm2kit.cli.options import JsonOption
from lfm2kit.cli.report import Report
from lfm2kit.kernel_cache import VARIABLE as CACHE_FOLDER
from lfm2kit.process import cgroups, machine
from lfm2kit.records.machine import versions

PACKAGES = ("numpy", "numba", "llvmlite", "cupy-cuda12x", "cupy-cuda13x", "mpi4py", "pluggy")
VARIABLES = (
    BACKEND_VARIABLE,
    ALLOW_LIST,
    CACHE_FOLDER,
    "XDG_CACHE_HOME",
    "NUMBA_NUM_THREADS",
    "OMP_NUM_THREADS",
)


def env(json: JsonOption = None) -> None:
    """Show versions, machine and plugins, for a bug report."""
    report = Report(json, "lfm2kit env")
    report.fields = _environment()
    for key, value in report.fields.items():
        report.line(f"{key + ':':12} {_text(value)}")
    report.write()


def _environment() -> dict[str, Any]:
    plugins = installed_plugins()
    return {
        "installed": versions(),
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": machine.processor(),
        "cores": machine.cores(),
        "memory": {limit.name: _of(limit) for limit in machine.memory_limits()},
        "processors": cgroups.processors() or "no cgroup limit",
        "packages": {name: _version(name) for name in PACKAGES if _version(name)},
        "mpiexec": shutil.which("mpiexec") or "none on the PATH",
        "backends": {n: b.why_not or "ready" for n, b in sorted(plugins.backends.items())},
        "broken": {b.name: b.reason for b in plugins.broken},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {item}" for key, item in value.items()) or "none"
    return str(value)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _of(limit: machine.Limit) -> str:
    return f"{size(limit.free)} free of {size(limit.limit)}"
