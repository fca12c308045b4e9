"""Descriptions of the blocks that a run of the suite looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lfm2kit.specs import Spec


@dataclass(frozen=True, slots=True)
class Pattern:
    """A description of some specs: their type, and some of their fields."""

    type: type[Spec]
    fields: tuple[tuple[str, Any], ...]  # each with a value, or a pattern of its own

    def fits(self, spec: object) -> bool:
        return isinstance(spec, self.type) and all(
            value.fits(getattr(spec, name))
            if isinstance(value, Pattern)
            else getattr(spec, name) == value
            for name, value in self.fields
        )

    def __str__(self) -> str:
        given = (f"{n}={v if isinstance(v, Pattern) else repr(v)}" for n, v in self.fields)
        return f"{self.type.kind}({', '.join(given)})"
