"""A plugin as it is installed: its package, what it adds, and why it is not used."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.metadata import Distribution, EntryPoint
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lfm2kit.backend import BackendPlugin
from lfm2kit.checkpoint.readers import CheckpointReader
from lfm2kit.hookspecs import Command
from lfm2kit.rewrites import Rewrite
from lfm2kit.transport import TransportPlugin

Announced = BackendPlugin | TransportPlugin | CheckpointReader | Rewrite | Command


@dataclass(frozen=True, slots=True)
class InstalledPlugin:
    """An entry point, and what was found when it was loaded."""

    entry: EntryPoint
    hooks: tuple[str, ...] = ()  # that it implements
    announced: tuple[Announced, ...] = ()  # by these hooks
    reason: str | None = None  # why it is not used, in one line
    traceback: str | None = None  # of one that could not be loaded

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def package(self) -> str:
        return self.entry.dist.name if self.entry.dist else "unknown"

    @property
    def version(self) -> str:
        return self.entry.dist.version if self.entry.dist else ""

    @property
    def distribution(self) -> str:
        """Return package and version, as in "lfm2kit-blas 0.1.0"."""
        return _named(self.entry.dist) if self.entry.dist else self.package

    @property
    def folder(self) -> Path | None:
        """Return where the package's code lies; None if that is not known."""
        if self.entry.dist is None:
            return None
        return editable_folder(self.entry.dist) or Path(str(self.entry.dist.locate_file("")))

    @property
    def is_editable(self) -> bool:
        return self.entry.dist is not None and editable_folder(self.entry.dist) is not None


@cache  # it parses a long file
def _named(distribution: Distribution) -> str:
    found = distribution.metadata
    return f"{found['Name']} {found['Version']}".rstrip()


def editable_folder(distribution: Distribution) -> Path | None:
    """Return the project that `pip install -e` has installed; None of a copy.

    Installers write it down where PEP 610 says.
    """
    try:
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        if origin["dir_info"]["editable"]:
            return Path(unquote(urlsplit(origin["url"]).path))
    except (ValueError, KeyError, TypeError):
        pass
    return None
