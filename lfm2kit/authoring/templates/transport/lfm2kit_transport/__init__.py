"""Announces the transport `$name`.  All commands import this, so it imports little."""

from __future__ import annotations

from collections.abc import Iterator

import lfm2kit

from .launcher import SwitchLauncher


@lfm2kit.hookimpl
def lfm2kit_transports() -> Iterator[lfm2kit.TransportPlugin]:
    summary = "ranks on one machine, through the process that has started them"
    yield lfm2kit.TransportPlugin("$name", summary, SwitchLauncher())
