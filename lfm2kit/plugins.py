"""Finds the installed plugins, and creates backends by name.  The only user of pluggy's manager.

A plugin that cannot be imported or announces nonsense is kept as a `BrokenPlugin`, listed by
`lfm2kit backends` with its traceback, and harms nothing else.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from lfm2kit import hookspecs
from lfm2kit.backend import API_VERSION, Backend, BackendPlugin, Block, Context
from lfm2kit.errors import Lfm2kitError, choices
from lfm2kit.specs import Spec
from lfm2kit.transport import TransportPlugin

GROUP = "lfm2kit"
ALLOW_LIST = "LFM2KIT_PLUGINS"  # comma-separated entry-point names; "none" for none


@dataclass(frozen=True, slots=True)
class BrokenPlugin:
    """An installed plugin that could not be loaded, and why."""

    name: str
    distribution: str
    reason: str  # one line
    details: str  # the traceback, where there is one


@dataclass(frozen=True, slots=True)
class InstalledBackend:
    """An announced backend and the distribution that it comes from."""

    plugin: BackendPlugin
    distribution: str

    @property
    def why_not(self) -> str | None:
        """Why this backend cannot run here: another API version, or what it says itself."""
        if self.plugin.api_version != API_VERSION:
            return (
                f"it is written for backend API {self.plugin.api_version}, "
                f"this lfm2kit has {API_VERSION}"
            )
        try:
            return self.plugin.why_unavailable()
        except Exception as error:
            return f"its why_unavailable() raised {type(error).__name__}: {error}"


class Plugins:
    """All that installed plugins add: backends, transports, block wrappers."""

    def __init__(self, entries: list[EntryPoint]) -> None:
        self.backends: dict[str, InstalledBackend] = {}
        self.transports: dict[str, TransportPlugin] = {}
        self.broken: list[BrokenPlugin] = []
        self._wrappers: list[tuple[str, Any]] = []
        for entry in entries:
            self._load(entry)

    def _load(self, entry: EntryPoint) -> None:
        """One plugin in a manager of its own, so that what is wrong with it stays with it."""
        distribution = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "unknown"
        try:
            manager = pluggy.PluginManager("lfm2kit")
            manager.add_hookspecs(hookspecs)
            plugin = entry.load()
            manager.register(plugin, entry.name)
            _refuse_unknown_hooks(plugin)
            backends = [b for some in manager.hook.lfm2kit_backends() for b in some]
            transports = [t for some in manager.hook.lfm2kit_transports() for t in some]
            self._announce(backends, transports, distribution)
            self._wrappers.append((entry.name, manager))
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:  # a plugin may well raise SystemExit
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            self.broken.append(
                BrokenPlugin(entry.name, distribution, reason, traceback.format_exc())
            )

    def _announce(self, backends: list[Any], transports: list[Any], distribution: str) -> None:
        for backend in backends:
            if not isinstance(backend, BackendPlugin):
                raise TypeError(f"lfm2kit_backends yielded {backend!r}, not a BackendPlugin")
            if (other := self.backends.get(backend.name)) is not None:
                raise ValueError(f"backend '{backend.name}' is {other.distribution}'s already")
        for transport in transports:
            if not isinstance(transport, TransportPlugin):
                raise TypeError(f"lfm2kit_transports yielded {transport!r}, not a TransportPlugin")
        self.backends |= {b.name: InstalledBackend(b, distribution) for b in backends}
        self.transports |= {t.name: t for t in transports}

    def backend(self, name: str) -> BackendPlugin:
        """The announced backend `name`, if it can run here; else `Lfm2kitError`."""
        if name not in self.backends:
            raise Lfm2kitError(f"unknown backend '{name}'; {choices(name, self.backends)}")
        installed = self.backends[name]
        if (reason := installed.why_not) is not None:
            others = ", ".join(sorted(n for n, b in self.backends.items() if b.why_not is None))
            raise Lfm2kitError(
                f"backend '{name}' is installed but cannot run here: {reason}. Can run: {others}"
            )
        return installed.plugin

    def auto(self, precision: str = "fp32") -> str:
        """The name that `--backend auto` stands for: the most preferred one that can run."""
        ready = [
            b.plugin
            for b in self.backends.values()
            if b.plugin.preference > 0 and precision in b.plugin.precisions and b.why_not is None
        ]
        if not ready:
            raise Lfm2kitError(
                f"no backend for precision {precision} can run here; see lfm2kit backends"
            )
        return max(ready, key=lambda plugin: plugin.preference).name

    def creator(self, context: Context) -> Callable[[str], Backend]:
        """Creates backends by name, each once; the context they get can create the others."""

        @cache
        def create(name: str) -> Backend:
            plugin = self.backend(name)
            if context.precision not in plugin.precisions:
                raise Lfm2kitError(
                    f"backend '{name}' has no precision {context.precision}; "
                    f"there is: {', '.join(plugin.precisions)}"
                )
            return plugin.create(replace(context, create_backend=create))

        return create

    def wrap(self, name: str, spec: Spec, block: Block) -> Block:
        """`block` inside the wrappers that plugins have for it, usually none."""
        for _, manager in self._wrappers:
            for wrapper in manager.hook.lfm2kit_block_wrapper(name=name, spec=spec):
                block = wrapper(block)
        return block

    def transport(self, name: str) -> TransportPlugin:
        """The announced transport `name`; else `Lfm2kitError`."""
        if name not in self.transports:
            raise Lfm2kitError(f"unknown transport '{name}'; {choices(name, self.transports)}")
        return self.transports[name]


def installed_plugins() -> Plugins:
    """The plugins of this environment that the allow-list lets in."""
    return Plugins(list(_allowed(os.environ.get(ALLOW_LIST))))


def _allowed(allow_list: str | None) -> Iterator[EntryPoint]:
    entries = sorted(entry_points(group=GROUP), key=lambda entry: entry.name)
    if allow_list is None:
        yield from entries
        return
    names = {name.strip() for name in allow_list.split(",")} - {"", "none"}
    if unknown := names - {entry.name for entry in entries}:
        asked = min(unknown)
        raise Lfm2kitError(
            f"{ALLOW_LIST} names '{asked}'; {choices(asked, [e.name for e in entries])}"
        )
    yield from (entry for entry in entries if entry.name in names)


def _refuse_unknown_hooks(plugin: Any) -> None:
    """A misspelt hook would otherwise be ignored in silence (pluggy checks only marked ones)."""
    known = {hook.__name__ for hook in hookspecs.HOOKS}
    for name in dir(plugin):
        if name.startswith("lfm2kit_") and name not in known and _is_marked(plugin, name):
            raise AttributeError(f"hook '{name}' does not exist; {choices(name, known)}")


def _is_marked(plugin: Any, name: str) -> bool:
    return hasattr(getattr(plugin, name), "lfm2kit_impl")
