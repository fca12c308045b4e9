"""Announces the backend `$name`.  All commands import this, so it imports little."""

from __future__ import annotations

from collections.abc import Iterator

import lfm2kit
from lfm2kit.backend import Backend, BackendPlugin, Context


def create(context: Context) -> Backend:
    from .backend import NumPyBackend  # heavy imports happen here

    return NumPyBackend(context)


def why_unavailable() -> str | None:
    """Return why the backend cannot run on this machine; None if it can."""
    return None


@lfm2kit.hookimpl
def lfm2kit_backends() -> Iterator[BackendPlugin]:
    yield BackendPlugin(
        name="$name",
        summary="dense feed-forwards and experts in NumPy",
        create=create,
        api_version=1,  # of the contract that this code was written for
        why_unavailable=why_unavailable,
    )
