"""Says on which machine, and with which versions, something was measured."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import numpy as np

from lfm2kit.backend import HOST, Context, Exclusive, Memory, NamesHardware
from lfm2kit.building.answers import Answers
from lfm2kit.building.capacity import answers_of
from lfm2kit.building.plugins import GROUP, Plugins
from lfm2kit.errors import Lfm2kitError
from lfm2kit.process import machine

if TYPE_CHECKING:
    from lfm2kit.building.loading import Setup


def now() -> str:
    """Return the date as records have it: ISO 8601, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@cache
def versions() -> dict[str, str]:
    """Return the versions of lfm2kit and of the installed plugins."""
    installed = (entry.dist for entry in entry_points(group=GROUP))
    return dict(sorted((one.name, one.version) for one in installed if one is not None))


def described(context: Context) -> dict[str, str]:
    """Return the names and versions that times on the host depend on."""
    ranks = {"ranks": str(context.local_ranks)} if context.local_ranks > 1 else {}
    return {
        "processor": machine.processor(),
        "cores": str(machine.cores()),
        "threads": str(context.threads or "all"),
        **ranks,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        **versions(),
    }


def hardware_of(asked: Answers, memory: Memory) -> dict[str, str]:
    """Return what a backend says of its device, or what its memory is called."""
    if isinstance(asked.backend, NamesHardware):
        return dict(asked.hardware())
    return {"device": memory.unit()} if isinstance(memory, Exclusive) else {}


def machine_with(context: Context, plugins: Plugins, name: str) -> dict[str, Any]:
    """Return the machine of a record on one backend alone."""
    named: dict[str, str] = {}
    with suppress(Lfm2kitError):  # of one that cannot be created: its record says so
        named = hardware_of(Answers(plugins.creator(context)(name), name), HOST)
    return _with_devices(context, {name: named})


def machine_of(*setups: Setup) -> dict[str, Any]:
    """Return the machine of a record: where models were set up, and on which devices."""
    devices = {name: named for setup in setups for name, named in _devices(setup).items()}
    return _with_devices(setups[0].context, devices)


def _with_devices(context: Context, devices: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    there = {name: named for name, named in sorted(devices.items()) if named}
    return {**described(context), **({"devices": there} if there else {})}


def _devices(setup: Setup) -> dict[str, dict[str, str]]:
    """Return what backends say of their devices, by the backend's name without a precision."""
    found: dict[str, dict[str, str]] = {}
    for leaf in setup.placed.leaves():
        if leaf.backend is None:  # of a set-up in which some blocks are not built
            continue
        name = leaf.backend.partition(":")[0]
        if name not in found:
            found[name] = hardware_of(answers_of(setup.create, leaf), leaf.memory)
    return found
