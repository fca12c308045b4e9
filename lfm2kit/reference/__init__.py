"""The reference backend: plain NumPy in float64, readable enough to be the documentation.

The slow twin of every fast backend and the oracle of their tests.
"""

from __future__ import annotations

from collections.abc import Iterator

from lfm2kit.backend import API_VERSION, Backend, BackendPlugin, Context
from lfm2kit.hookspecs import hookimpl


def _create(context: Context) -> Backend:
    from lfm2kit.reference.backend import ReferenceBackend

    return ReferenceBackend()


@hookimpl
def lfm2kit_backends() -> Iterator[BackendPlugin]:
    yield BackendPlugin(
        name="reference",
        summary="plain NumPy in float64: slow, clear, the oracle of every test",
        create=_create,
        api_version=API_VERSION,
        preference=1,
    )
