"""The backends of this environment, each in a precision that it has."""

from __future__ import annotations

from lfm2kit.building.plugins import InstalledBackend
from lfm2kit.precisions import FP32


def item_of(name: str, installed: InstalledBackend) -> str:
    """Return a plan's item: the backend in fp32, or else in its first precision."""
    precisions = [precision.name for precision in installed.plugin.precisions]
    return name if FP32.name in precisions else f"{name}:{precisions[0]}"
