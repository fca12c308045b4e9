"""The JSON Schemas (draft 2020-12) of all records that lfm2kit's own commands write, one a kind.

`record.json` has what they have in common.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

COMMON = "record.json"  # by which the others refer to it


@cache
def schemas() -> dict[str, dict[str, Any]]:
    """Return the schemas by kind."""
    names = (one.name for one in files(__name__).iterdir() if one.name.endswith(".json"))
    found = (_schema(name) for name in names if name != COMMON)
    return dict(sorted((one["properties"]["kind"]["const"], one) for one in found))


def common() -> dict[str, Any]:
    """Return the schema of what all records have in common."""
    return _schema(COMMON)


def _schema(name: str) -> dict[str, Any]:
    schema: dict[str, Any] = json.loads(files(__name__).joinpath(name).read_text("utf-8"))
    return schema
