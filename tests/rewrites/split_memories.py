"""Backends in memories of their own that can add, for experts that are split."""

from __future__ import annotations

from typing import Any

from tests.conformance.late import Late, LateBackend, LateMemory
from tests.core.test_model import Box, DeviceBackend, Elsewhere


class Adding(Elsewhere):
    """Boxed arrays that can be added."""

    def add(self, left: Box, right: Box) -> Box:
        return Box(left.values + right.values)


class AddingBackend(DeviceBackend):
    def __init__(self) -> None:
        super().__init__()
        self.there = Adding("elsewhere that adds")


class LateAdding(LateMemory):
    """A memory that works as late as it may."""

    def add(self, left: Late, right: Late) -> Late:
        total = Late(left.shape)
        self.current.add(lambda: total.make(left.values + right.values))
        return total


class LateAddingBackend(LateBackend):
    def __init__(self) -> None:
        super().__init__(LateAdding())


def backends() -> dict[str, Any]:
    """Return all of them, and one whose memory cannot add."""
    return {"adding": AddingBackend(), "late": LateAddingBackend(), "device": DeviceBackend()}
