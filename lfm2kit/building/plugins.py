"""Finds the installed plugins, and creates backends by name.  The only user of pluggy's manager.

A plugin that cannot be imported or announces nonsense is kept as a `BrokenPlugin`, listed by
`lfm2kit backends` with its traceback, and harms nothing else.
"""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

from lfm2kit import hookspecs
from lfm2kit.backend import API_VERSION, Backend, BackendPlugin, Context
from lfm2kit.building.plan import AUTO
from lfm2kit.checkpoint.readers import CheckpointReader
from lfm2kit.errors import LEAVE_OUT, TRACEBACK_HINT, Lfm2kitError, choices
from lfm2kit.hookspecs import Command, Wrapper
from lfm2kit.memory import Memory
from lfm2kit.precisions import Precision
from lfm2kit.rewrites import Rewrite, built_in
from lfm2kit.specs import Spec
from lfm2kit.transport import Transport, TransportPlugin, World

if TYPE_CHECKING:
    from lfm2kit.checkpoint import Checkpoint

Answer = TypeVar("Answer")

GROUP = "lfm2kit"
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
RESERVED = {AUTO}
# lfm2kit's own commands, which no plugin may take.
COMMANDS = frozenset(("backends", "bench", "convert", "env", "plan", "run", "specs", "warmup"))
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
        except (Exception, SystemExit) as error:
            return f"its why_unavailable() raised {type(error).__name__}: {error}"


@dataclass(frozen=True, slots=True)
class InstalledReader:
    """An announced reader and the distribution that it comes from."""

    plugin: CheckpointReader
    distribution: str

    def __str__(self) -> str:
        return f"reader '{self.plugin.name}' of {self.distribution}"

    def recognises(self, path: Path) -> bool:
        """Whether the reader takes `path`; as `open`, `Lfm2kitError` where it raises something."""
        return bool(self._asked(self.plugin.recognises, path))

    def open(self, path: Path) -> Checkpoint:
        """Returns what the reader makes of `path`."""
        return self._asked(self.plugin.open, path)

    def _asked(self, question: Callable[[Path], Answer], path: Path) -> Answer:
        try:
            return question(path)
        except (Lfm2kitError, MemoryError):
            raise
        except (Exception, SystemExit) as error:
            said = (str(error).splitlines() or [""])[0]
            raise Lfm2kitError(
                f"{path}: {self} raised {type(error).__name__}: {said}; {LEAVE_OUT}{TRACEBACK_HINT}"
            ) from error


class Plugins:
    """All that installed plugins add: backends, transports, readers, rewrites, and the rest."""

    def __init__(self, entries: list[EntryPoint]) -> None:
        self.backends: dict[str, InstalledBackend] = {}
        self.transports: dict[str, TransportPlugin] = {}
        self.readers: dict[str, InstalledReader] = {}
        self.commands: dict[str, Command] = {}
        self._owners = dict.fromkeys(COMMANDS, "lfm2kit")  # of commands
        self.loaded: list[EntryPoint] = []
        self.broken: list[BrokenPlugin] = []
        self._managers: list[tuple[str, pluggy.PluginManager]] = []
        self._rewriters: dict[str, str] = {}  # the plugin that announces each rewrite
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
            _check_hooks(plugin)
            backends = [b for some in manager.hook.lfm2kit_backends() for b in some]
            transports = [t for some in manager.hook.lfm2kit_transports() for t in some]
            readers = [r for some in manager.hook.lfm2kit_checkpoints() for r in some]
            rewrites = _announced_rewrites(manager, World(), None)
            commands = [c for some in manager.hook.lfm2kit_commands() for c in some]
            self._announce(backends, transports, readers, rewrites, commands, distribution)
            self._rewriters |= {rewrite.name: entry.name for rewrite in rewrites}
            self._managers.append((entry.name, manager))
            self.loaded.append(entry)
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:  # a plugin may well raise SystemExit
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            self.broken.append(
                BrokenPlugin(entry.name, distribution, reason, traceback.format_exc())
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
        """All that a plugin yields, or nothing of it: a bad name leaves no half behind."""
        owners = {name: b.distribution for name, b in self.backends.items()}
        _check_announced("lfm2kit_backends", backends, BackendPlugin, owners)
        _check_precisions(backends)
        others = dict.fromkeys(self.transports, "another plugin")
        _check_announced("lfm2kit_transports", transports, TransportPlugin, others)
        owners = {name: r.distribution for name, r in self.readers.items()}
        _check_announced("lfm2kit_checkpoints", readers, CheckpointReader, owners)
        _check_announced("lfm2kit_commands", commands, Command, self._owners)
        _check_announced("lfm2kit_rewrites", rewrites, Rewrite, self._owners_of_rewrites())
        self.backends |= {b.name: InstalledBackend(b, distribution) for b in backends}
        self.transports |= {t.name: t for t in transports}
        self.readers |= {r.name: InstalledReader(r, distribution) for r in readers}
        self.commands |= {c.name: c for c in commands}
        self._owners |= {c.name: distribution for c in commands}

    def backend(self, item: str) -> BackendPlugin:
        """The announced backend of a plan's item, `NAME` or `NAME:bf16`, if it can run here.

        Raises `Lfm2kitError` if it cannot, or is not there.
        """
        name = item.partition(":")[0]
        if name not in self.backends:
            known = choices(name, self.backends)
            raise Lfm2kitError(f"unknown backend '{name}'; {known}{self.skipped(name)}")
        installed = self.backends[name]
        if (reason := installed.why_not) is not None:
            others = ", ".join(sorted(n for n, b in self.backends.items() if b.why_not is None))
            raise Lfm2kitError(
                f"backend '{name}' is installed but cannot run here: {reason}. Can run: {others}"
            )
        return installed.plugin

    def skipped(self, name: str) -> str:
        """Returns what an error about an unknown `name` ends with: which plugins are broken."""
        for plugin in self.broken:
            if plugin.name == name:
                return f"; its plugin was skipped: {plugin.reason}"
        if not self.broken:
            return ""
        names = ", ".join(plugin.name for plugin in self.broken)
        return f"; plugins that were skipped (see lfm2kit backends): {names}"

    def precision(self, item: str, otherwise: str) -> Precision:
        """The precision of a plan's item: its own (`NAME:bf16`), or else that of this name.

        Raises `Lfm2kitError` if the backend has no such precision, or cannot run.
        """
        plugin, wanted = self.backend(item), item.partition(":")[2] or otherwise
        for precision in plugin.precisions:
            if precision.name == wanted:
                return precision
        there = ", ".join(precision.name for precision in plugin.precisions)
        raise Lfm2kitError(f"backend '{plugin.name}' has no precision {wanted}; there is: {there}")

    def auto(self, precision: str = "fp32") -> str:
        """Returns the name that `auto` stands for in a plan: the most preferred that can run."""
        ready = self.ready(precision)
        if not ready:
            limit = (
                f"{ALLOW_LIST} is {os.environ[ALLOW_LIST]}; " if ALLOW_LIST in os.environ else ""
            )
            raise Lfm2kitError(
                f"no backend for precision {precision} can run here; {limit}see lfm2kit backends"
            )
        return ready[0]

    def ready(self, precision: str) -> list[str]:
        """Returns the names of the backends that can run here, the most preferred first."""
        able = [
            b.plugin
            for b in self.backends.values()
            if b.plugin.preference > 0
            and any(precision == there.name for there in b.plugin.precisions)
            and b.why_not is None
        ]
        return [p.name for p in sorted(able, key=lambda plugin: -plugin.preference)]

    def rewrites(
        self, world: World | None = None, transport: Transport | None = None
    ) -> dict[str, Rewrite]:
        """Returns all rewrites by name, for a process at this place of a job, lfm2kit's own first.

        Raises `Lfm2kitError`, naming the plugin, if a plugin's hook fails.
        """
        world = world or World()
        found = {rewrite.name: rewrite for rewrite in built_in(world, transport)}
        for plugin, manager in self._managers:
            try:
                rewrites = _announced_rewrites(manager, world, transport)
                others = {name: p for name, p in self._owners_of_rewrites().items() if p != plugin}
                _check_announced("lfm2kit_rewrites", rewrites, Rewrite, others)
            except Exception as error:
                raise Lfm2kitError(
                    f"plugin '{plugin}' cannot say its rewrites for rank {world.rank} of "
                    f"{world.size}: {type(error).__name__}: {error}{TRACEBACK_HINT}"
                ) from error
            found |= {rewrite.name: rewrite for rewrite in rewrites}
        return found

    def _owners_of_rewrites(self) -> dict[str, str]:
        ours = (rewrite.name for rewrite in built_in(World(size=2), None))
        return {**self._rewriters, **dict.fromkeys(ours, "lfm2kit")}

    def creator(self, context: Context) -> Callable[[str], Backend]:
        """Creates backends by the items of a plan, each in each precision once.

        The context that a backend gets can create the others, in its own precision.
        """

        @cache
        def created(name: str, precision: str) -> Backend:
            of_same = partial(create, precision=precision)
            own = replace(context, precision=precision, create_backend=of_same)
            try:
                return self.backend(name).create(own)
            except Lfm2kitError:
                raise
            except (Exception, SystemExit) as error:
                raise Lfm2kitError(
                    f"backend '{name}' of {self.backends[name].distribution} cannot be created: "
                    f"{type(error).__name__}: {error}{TRACEBACK_HINT}"
                ) from error

        @cache  # whether a backend can run is asked once
        def create(item: str, precision: str = context.precision) -> Backend:
            return created(self.backend(item).name, self.precision(item, precision).name)

        return create

    def owner(self, command: str) -> str:
        """Returns the distribution that a command comes from."""
        return self._owners[command]

    def wrappers(self, name: str, spec: Spec, memory: Memory) -> list[tuple[str, Wrapper]]:
        """Returns the wrappers around a block, each with its plugin's name, the innermost first."""
        found = []
        for plugin, manager in self._managers:
            for wrapper in manager.hook.lfm2kit_block_wrapper(name=name, spec=spec, memory=memory):
                if not isinstance(wrapper, Wrapper):
                    raise TypeError(
                        f"plugin '{plugin}' returned {wrapper!r} for {name}, not an lfm2kit.Wrapper"
                    )
                found.append((plugin, wrapper))
        return found

    def run_ended(self, record: Mapping[str, Any]) -> dict[str, Exception]:
        """Tells every plugin that a run has ended; returns what plugins raised, by their names."""
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
    """The plugins of this environment that the allow-list lets in."""
    return Plugins(list(_allowed(os.environ.get(ALLOW_LIST))))


def find_transport(name: str) -> TransportPlugin:
    """Loads the plugin of the transport `name`, and no other plugin, and returns the transport.

    That is the plugin whose entry point is called `name`, even if the allow-list leaves it out.
    Plugins of the list are loaded only if it announces no such transport.  Raises `Lfm2kitError`.
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
        raise Lfm2kitError(f"unknown transport '{name}'; {choices(name, plugins.transports)}")
    return plugins.transports[name]


def _installed() -> list[EntryPoint]:
    return sorted(entry_points(group=GROUP), key=lambda entry: entry.name)


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


def _announced_rewrites(manager: Any, world: World, transport: Transport | None) -> list[Any]:
    announced = manager.hook.lfm2kit_rewrites(world=world, transport=transport)
    return [rewrite for some in announced for rewrite in some]


def _check_hooks(plugin: Any) -> None:
    """A misspelt hook, and one without its mark, would otherwise be ignored in silence."""
    known = {hook.__name__ for hook in hookspecs.HOOKS}
    for name in dir(plugin):
        is_marked = hasattr(getattr(plugin, name), "lfm2kit_impl")
        if is_marked and name not in known:
            raise AttributeError(f"hook '{name}' does not exist; {choices(name, known)}")
        if name in known and not is_marked:
            raise AttributeError(f"hook '{name}' is not marked with @lfm2kit.hookimpl")


def _check_announced(
    hook: str, announced: list[Any], expected: type[Any], owners: Mapping[str, str]
) -> None:
    """What a hook yielded is of its type, under names that a plan can say and nobody has."""
    owners = dict(owners)
    for plugin in announced:
        if not isinstance(plugin, expected):
            raise TypeError(f"{hook} yielded {plugin!r}, not a {expected.__name__}")
        if not isinstance(plugin.name, str) or not NAME.fullmatch(plugin.name):
            raise ValueError(f"{hook} yielded the name {plugin.name!r}; a name is like my_backend")
        if plugin.name in RESERVED:
            raise ValueError(f"{hook} yielded the name '{plugin.name}', which means something else")
        if plugin.name in owners:
            raise ValueError(f"{hook} yielded '{plugin.name}', which is {owners[plugin.name]}'s")
        owners[plugin.name] = "its own already"


def _check_precisions(backends: list[BackendPlugin]) -> None:
    """A name alone does not say how results are judged."""
    for backend in backends:
        for precision in backend.precisions:
            if not isinstance(precision, Precision) or not NAME.fullmatch(precision.name):
                raise TypeError(
                    f"backend '{backend.name}' announces the precision {precision!r}; "
                    "write Precision('bf16', SIXTEEN_BIT)"
                )
