"""Finds the installed plugins, and creates backends by name.  The only user of pluggy's manager.

A plugin that cannot be imported or announces nonsense is set aside, listed by `lfm2kit plugins`
with its traceback, and harms nothing else.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from reprlib import repr as brief  # of what a plugin returned, however long it is
from typing import TYPE_CHECKING, Any, cast

import pluggy

from lfm2kit import hookspecs
from lfm2kit.backend import API_VERSION, Backend, BackendPlugin, Context
from lfm2kit.building.announced import check_announced, check_hooks
from lfm2kit.building.installed import InstalledPlugin
from lfm2kit.checkpoint.readers import CheckpointReader
from lfm2kit.errors import LEAVE_OUT, Lfm2kitError, choices
from lfm2kit.hookspecs import Command, Wrapper
from lfm2kit.host_exchange import AUTO
from lfm2kit.memory import Memory
from lfm2kit.plugin_faults import blaming
from lfm2kit.precisions import Precision
from lfm2kit.rewrites import OwnersOf, Rewrite, built_in, kept_to_contract
from lfm2kit.specs import Spec
from lfm2kit.transport import Transport, TransportPlugin, World

if TYPE_CHECKING:
    from lfm2kit.checkpoint import Checkpoint

GROUP = "lfm2kit"
# lfm2kit's own commands, which no plugin may take.
COMMANDS = frozenset(
    [
        "backends",
        "bench",
        "calibrate",
        "chat",
        "compare",
        "convert",
        "env",
        "generate",
        "grade",
        "plan",
        "plugins",
        "profile",
        "run",
        "specs",
        "tokenize",
        "transports",
        "verify",
        "warmup",
    ]
)
# Hooks that are not asked when a plugin is loaded, or that may yield more in a job.
LATER = frozenset(["lfm2kit_block_wrapper", "lfm2kit_run_ended", "lfm2kit_rewrites"])
METHODS = ("why_unsupported", "memory", "build")  # that every backend has
ALLOW_LIST = "LFM2KIT_PLUGINS"  # comma-separated entry-point names; "none" for none


@dataclass(frozen=True, slots=True)
class InstalledBackend:
    """An announced backend and the distribution that it comes from."""

    plugin: BackendPlugin
    distribution: str

    @property
    def why_not(self) -> str | None:
        """Return why this backend cannot run here: another API version, or its own reason."""
        if self.plugin.api_version != API_VERSION:
            return (
                f"it is written for backend API {self.plugin.api_version}, "
                f"this lfm2kit has {API_VERSION}"
            )
        try:
            reason: object = self.plugin.why_unavailable()
        except (Exception, SystemExit) as error:
            return f"its why_unavailable() raised {type(error).__name__}: {error}"
        if reason is None or isinstance(reason, str):
            return reason
        return f"its why_unavailable() returned {brief(reason)}, not a text or None"


@dataclass(frozen=True, slots=True)
class InstalledReader:
    """An announced reader and the distribution that it comes from."""

    plugin: CheckpointReader
    distribution: str

    def __str__(self) -> str:
        return f"reader '{self.plugin.name}' of {self.distribution}"

    def recognises(self, path: Path) -> bool:
        """Return whether the reader takes `path`; raise `Lfm2kitError` if it raises something."""
        with self._blamed(path):
            return bool(self.plugin.recognises(path))

    def open(self, path: Path) -> Checkpoint:
        """Return what the reader makes of `path`."""
        with self._blamed(path):
            return self.plugin.open(path)

    def _blamed(self, path: Path) -> AbstractContextManager[None]:
        return blaming(f"{path}: {self}", f"; {LEAVE_OUT}")


class Plugins:
    """The additions of all installed plugins: backends, transports, readers, rewrites and so on."""

    def __init__(self, entries: list[EntryPoint]) -> None:
        self.backends: dict[str, InstalledBackend] = {}
        self.transports: dict[str, TransportPlugin] = {}
        self.readers: dict[str, InstalledReader] = {}
        self.commands: dict[str, Command] = {}
        self._owners = dict.fromkeys(COMMANDS, "lfm2kit")  # of commands
        self.installed: list[InstalledPlugin] = []
        self._managers: list[tuple[str, pluggy.PluginManager]] = []
        self._rewriters: dict[str, str] = {}  # the plugin that announces each rewrite
        for entry in entries:
            self._load(entry)

    @property
    def loaded(self) -> list[InstalledPlugin]:
        return [one for one in self.installed if one.traceback is None]

    @property
    def broken(self) -> list[InstalledPlugin]:
        """Return the plugins that could not be loaded."""
        return [one for one in self.installed if one.traceback is not None]

    @property
    def silent(self) -> list[InstalledPlugin]:
        """Return the plugins that were loaded, but add nothing."""
        return [one for one in self.loaded if one.reason is not None]

    def _load(self, entry: EntryPoint) -> None:
        try:
            self.installed.append(self._loaded(entry))
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:  # a plugin may well raise SystemExit
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            broken = InstalledPlugin(entry, reason=reason, traceback=traceback.format_exc())
            self.installed.append(broken)

    def _loaded(self, entry: EntryPoint) -> InstalledPlugin:
        """Load one plugin in a manager of its own, so that its faults do not affect the others."""
        manager = pluggy.PluginManager("lfm2kit")
        manager.add_hookspecs(hookspecs)
        plugin = entry.load()
        manager.register(plugin, entry.name)
        check_hooks(plugin)
        backends = [b for some in manager.hook.lfm2kit_backends() for b in some]
        transports = [t for some in manager.hook.lfm2kit_transports() for t in some]
        readers = [r for some in manager.hook.lfm2kit_checkpoints() for r in some]
        rewrites = _announced_rewrites(manager, World(), None)
        commands = [c for some in manager.hook.lfm2kit_commands() for c in some]
        distribution = InstalledPlugin(entry).distribution
        self._announce(backends, transports, readers, rewrites, commands, distribution)
        self._rewriters |= {rewrite.name: entry.name for rewrite in rewrites}
        self._managers.append((entry.name, manager))
        hooks = sorted(caller.name for caller in manager.get_hookcallers(plugin) or ())
        announced = (*backends, *transports, *readers, *rewrites, *commands)
        return InstalledPlugin(
            entry, tuple(hooks), announced, None if announced else _why_silent(hooks)
        )

    def _announce(
        self,
        backends: list[Any],
        transports: list[Any],
        readers: list[Any],
        rewrites: list[Any],
        commands: list[Any],
        distribution: str,
    ) -> None:
        """Add everything that a plugin yields, or nothing if a part of it is wrong."""
        owners = {name: b.distribution for name, b in self.backends.items()}
        check_announced("lfm2kit_backends", backends, BackendPlugin, owners)
        others = dict.fromkeys(self.transports, "another plugin")
        check_announced("lfm2kit_transports", transports, TransportPlugin, others)
        owners = {name: r.distribution for name, r in self.readers.items()}
        check_announced("lfm2kit_checkpoints", readers, CheckpointReader, owners)
        check_announced("lfm2kit_commands", commands, Command, self._owners)
        check_announced("lfm2kit_rewrites", rewrites, Rewrite, self._owners_of_rewrites())
        self.backends |= {b.name: InstalledBackend(b, distribution) for b in backends}
        self.transports |= {t.name: t for t in transports}
        self.readers |= {r.name: InstalledReader(r, distribution) for r in readers}
        self.commands |= {c.name: c for c in commands}
        self._owners |= {c.name: distribution for c in commands}

    def backend(self, item: str) -> BackendPlugin:
        """Return the announced backend of a plan's item, `NAME` or `NAME:bf16`, if it can run here.

        Raise `Lfm2kitError` if it cannot, or is not there.
        """
        name = item.partition(":")[0]
        if name not in self.backends:
            there = choices(name, self.backends)
            raise Lfm2kitError(f"unknown backend '{name}'; {there}{self.skipped()}")
        installed = self.backends[name]
        if (reason := installed.why_not) is not None:
            others = ", ".join(sorted(n for n, b in self.backends.items() if b.why_not is None))
            raise Lfm2kitError(
                f"backend '{name}' is installed but cannot run here: {reason}. "
                f"Backends that can run: {others}"
            )
        return installed.plugin

    def distribution(self, item: str) -> str:
        """Return the distribution that the backend of a plan's item comes from."""
        return self.backends[item.partition(":")[0]].distribution

    def precision(self, item: str, otherwise: str) -> Precision:
        """Return the precision of a plan's item: its own (`NAME:bf16`), or else that of this name.

        Raise `Lfm2kitError` if the backend has no such precision, or cannot run.
        """
        plugin, wanted = self.backend(item), item.partition(":")[2] or otherwise
        for precision in plugin.precisions:
            if precision.name == wanted:
                return precision
        there = ", ".join(precision.name for precision in plugin.precisions)
        own = f"{plugin.name}:{plugin.precisions[0].name}"
        hint = "" if ":" in item else f"; to name one for this backend alone, write {own}"
        raise Lfm2kitError(
            f"backend '{plugin.name}' has no precision {wanted}; available: {there}{hint}"
        )

    def auto(self, precision: str = "fp32") -> str:
        """Return the name that `auto` stands for in a plan: the most preferred that can run."""
        ready = self.ready(precision)
        if not ready:
            raise Lfm2kitError(
                f"no backend for precision {precision} can run here{_limit()}; see lfm2kit backends"
            )
        return ready[0]

    def ready(self, precision: str) -> list[str]:
        """Return the names of the backends that can run here, the most preferred first."""
        able = [
            b.plugin
            for b in self.backends.values()
            if b.plugin.preference > 0
            and any(precision == there.name for there in b.plugin.precisions)
            and b.why_not is None
        ]
        return [p.name for p in sorted(able, key=lambda plugin: -plugin.preference)]

    def by_preference(self) -> list[str]:
        """Return the names of all backends, the most preferred first."""
        return sorted(self.backends, key=lambda name: -self.backends[name].plugin.preference)

    def rewrites(
        self,
        world: World | None = None,
        transport: Transport | None = None,
        owners_of: OwnersOf | None = None,
        exchange: str = AUTO,
    ) -> dict[str, Rewrite]:
        """Return all rewrites by name, for a process at this place of a job, lfm2kit's own first.

        `owners_of` says which ranks hold each expert, if they are not shared out in order, and
        `exchange` where tokens may travel.
        Raise `Lfm2kitError`, naming the plugin, if a plugin's hook fails.
        """
        world = world or World()
        ours = built_in(world, transport, owners_of, exchange)
        found = {rewrite.name: rewrite for rewrite in ours}
        for plugin, manager in self._managers:
            others = {name: p for name, p in self._owners_of_rewrites().items() if p != plugin}
            with blaming(f"plugin '{plugin}', asked for rank {world.rank} of {world.size},"):
                rewrites = _announced_rewrites(manager, world, transport)
                check_announced("lfm2kit_rewrites", rewrites, Rewrite, others)
            found |= {r.name: kept_to_contract(r, plugin, world.size) for r in rewrites}
        return found

    def _owners_of_rewrites(self) -> dict[str, str]:
        ours = (rewrite.name for rewrite in built_in(World(size=2), None))
        return {**self._rewriters, **dict.fromkeys(ours, "lfm2kit")}

    def creator(self, context: Context) -> Callable[[str], Backend]:
        """Create backends by the items of a plan, each in each precision once.

        The context that a backend gets can create the others, in its own precision.
        """

        @cache
        def created(name: str, precision: str) -> Backend:
            of_same = partial(create, precision=precision)
            own = replace(context, precision=precision, create_backend=of_same)
            who = f"create() of backend '{name}' of {self.backends[name].distribution}"
            with blaming(who):
                backend: Any = self.backend(name).create(own)
            if not all(callable(getattr(backend, method, None)) for method in METHODS):
                raise Lfm2kitError(f"{who} returned {brief(backend)}, not a Backend")
            return cast(Backend, backend)

        @cache  # whether a backend can run is asked once
        def create(item: str, precision: str = context.precision) -> Backend:
            return created(self.backend(item).name, self.precision(item, precision).name)

        return create

    def skipped(self) -> str:
        """Return what to add where something is not there: plugins that are not used."""
        broken = ", ".join(f"'{one.name}' ({one.reason})" for one in self.broken)
        silent = ", ".join(f"'{one.name}' ({one.reason})" for one in self.silent)
        said = f"; skipped as broken: plugin {broken}" if broken else ""
        said += f"; without any addition: plugin {silent}" if silent else ""
        said += _limit()
        return f"{said}; see lfm2kit plugins" if said else ""

    def owner(self, command: str) -> str:
        """Return the distribution that a command comes from."""
        return self._owners[command]

    def wrappers(self, name: str, spec: Spec, memory: Memory) -> list[tuple[str, Wrapper]]:
        """Return the wrappers around a block, each with its plugin's name, the innermost first."""
        found = []
        for plugin, manager in self._managers:
            who = f"lfm2kit_block_wrapper of plugin '{plugin}', asked about {name or 'the model'},"
            with blaming(who):
                some = manager.hook.lfm2kit_block_wrapper(name=name, spec=spec, memory=memory)
            for wrapper in some:
                if not isinstance(wrapper, Wrapper) or not callable(wrapper.wrap):
                    raise Lfm2kitError(
                        f"{who} returned {brief(wrapper)}, not an lfm2kit.Wrapper around a function"
                    )
                found.append((plugin, wrapper))
        return found

    def run_ended(self, record: Mapping[str, Any]) -> dict[str, Exception]:
        """Tell every plugin that a run has ended; return what plugins raised, by their names."""
        raised = {}
        for plugin, manager in self._managers:
            try:
                manager.hook.lfm2kit_run_ended(record=deepcopy(record))
            except Exception as error:
                raised[plugin] = error
            except SystemExit as error:
                raised[plugin] = RuntimeError(f"SystemExit: {error}")
        return raised


def installed_plugins() -> Plugins:
    """Return the plugins of this environment that the allow-list lets in."""
    return Plugins(list(_allowed(os.environ.get(ALLOW_LIST))))


def left_out() -> list[InstalledPlugin]:
    """Return the plugins that the allow-list leaves out, which are not imported."""
    allowed = list(_allowed(os.environ.get(ALLOW_LIST)))
    reason = f"{ALLOW_LIST} does not name it"
    return [InstalledPlugin(one, reason=reason) for one in _installed() if one not in allowed]


def find_transport(name: str) -> TransportPlugin:
    """Load the plugin of the transport `name`, and no other plugin, and return the transport.

    That is the plugin whose entry point is called `name`, even if the allow-list leaves it out.
    Plugins of the list are loaded only if it announces no such transport.  Raise `Lfm2kitError`.
    """
    named = Plugins([entry for entry in _installed() if entry.name == name])
    if name in named.transports:
        return named.transports[name]
    if named.broken:
        raise Lfm2kitError(
            f"transport '{name}' cannot be used: its plugin is broken: {named.broken[0].reason}"
        )
    plugins = installed_plugins()
    if name not in plugins.transports:
        there = choices(name, plugins.transports)
        raise Lfm2kitError(f"unknown transport '{name}'; {there}{plugins.skipped()}")
    return plugins.transports[name]


def _installed() -> list[EntryPoint]:
    """Return the entry points of plugins; look again only after a folder of them has changed."""
    return _found(tuple((folder, _changed(folder)) for folder in sys.path))


@lru_cache(1)
def _found(folders: tuple[tuple[str, int | None], ...]) -> list[EntryPoint]:
    return sorted(entry_points(group=GROUP), key=lambda entry: entry.name)


def _changed(folder: str) -> int | None:
    """Return when something was installed into `folder`, or removed; None without a folder."""
    try:
        return os.stat(folder or ".").st_mtime_ns
    except OSError:
        return None


def _allowed(allow_list: str | None) -> Iterator[EntryPoint]:
    entries = _installed()
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


def _limit() -> str:
    """Return what to add where a plugin may be missing, if not all of them are loaded."""
    return f"; {ALLOW_LIST} is {os.environ[ALLOW_LIST]}" if ALLOW_LIST in os.environ else ""


def _why_silent(hooks: list[str]) -> str | None:
    """Return why a plugin with these hooks, which have yielded nothing, is not used at all."""
    if LATER.intersection(hooks):
        return None
    if not hooks:
        return "none of its functions is marked with @lfm2kit.hookimpl"
    return f"{' and '.join(hooks)} yielded nothing"


def _announced_rewrites(manager: Any, world: World, transport: Transport | None) -> list[Any]:
    announced = manager.hook.lfm2kit_rewrites(world=world, transport=transport)
    return [rewrite for some in announced for rewrite in some]
