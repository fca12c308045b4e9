"""`lfm2kit plugins`: which packages are installed, what they add, and why one is not used."""

from __future__ import annotations

from typing import Any

from lfm2kit.backend import API_VERSION, BackendPlugin
from lfm2kit.building.installed import Announced, InstalledPlugin
from lfm2kit.building.plugins import Plugins, installed_plugins, left_out
from lfm2kit.checkpoint.readers import CheckpointReader
from lfm2kit.cli.options import JsonOption
from lfm2kit.cli.report import Report
from lfm2kit.hookspecs import Command
from lfm2kit.rewrites import Rewrite
from lfm2kit.text import indented
from lfm2kit.transport import TransportPlugin

KINDS = {
    BackendPlugin: "backend",
    TransportPlugin: "transport",
    CheckpointReader: "reader",
    Rewrite: "rewrite",
    Command: "command",
}


def plugins(json: JsonOption = None) -> None:
    """List the installed plugins: their packages, what they add, and why one is not used."""
    installed, report = installed_plugins(), Report(json, "lfm2kit plugins")
    found = sorted([*installed.installed, *left_out()], key=lambda one: one.name)
    report.fields = {
        "api_version": API_VERSION,
        "plugins": [_description(one, installed) for one in found],
    }
    for row in report.fields["plugins"]:
        _show(report, row)
    report.write()


def _description(plugin: InstalledPlugin, plugins: Plugins) -> dict[str, Any]:
    return {
        "name": plugin.name,
        "package": plugin.package,
        "version": plugin.version,
        "folder": None if plugin.folder is None else str(plugin.folder),
        "editable": plugin.is_editable,
        "hooks": plugin.hooks,
        "adds": [_addition(one, plugins) for one in plugin.announced],
        "not_used": plugin.reason,
        "traceback": plugin.traceback,
    }


def _addition(announced: Announced, plugins: Plugins) -> dict[str, Any]:
    kind = next(name for one, name in KINDS.items() if isinstance(announced, one))
    summary = None if isinstance(announced, Command) else announced.summary
    row: dict[str, Any] = {"kind": kind, "name": announced.name, "summary": summary}
    if isinstance(announced, BackendPlugin):
        row |= {
            "api_version": announced.api_version,
            "cannot_run": plugins.backends[announced.name].why_not,
        }
    return row


def _show(report: Report, row: dict[str, Any]) -> None:
    """Print a plugin's paragraph: it has too much to say for a row of a table."""
    place = f", {'editable' if row['editable'] else 'installed'} in {row['folder']}"
    package = f"{row['package']} {row['version']}".rstrip()
    report.line(f"{row['name']}: {package}{place if row['folder'] else ''}")
    if row["not_used"] is not None:
        report.line(f"  not used: {row['not_used']}")
    if row["hooks"]:
        report.line(f"  hooks: {', '.join(row['hooks'])}")
    for one in row["adds"]:
        report.line(f"  {_said(one)}")
    for line in indented(row["traceback"] or ""):
        report.line(f"  {line}")


def _said(row: dict[str, Any]) -> str:
    """Return the line of something that a plugin adds."""
    api = f" (API {row['api_version']})" if "api_version" in row else ""
    summary = "" if row["summary"] is None else f": {row['summary']}"
    reason = row.get("cannot_run")
    here = "" if reason is None else f" (cannot run here: {reason})"
    return f"{row['kind']} {row['name']}{api}{summary}{here}"
