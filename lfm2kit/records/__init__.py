"""Versioned records of what a command was asked, where it ran, and what came of it.

Plugins' commands write theirs with `Report`, as lfm2kit's own do, and read figures with `values`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lfm2kit.records.figures import Better, Figure, values

if TYPE_CHECKING:
    from lfm2kit.cli.report import Report as Report
else:

    def __getattr__(name: str) -> Any:
        """Import the command line for `Report` alone: its modules import this package."""
        if name != "Report":
            raise AttributeError(f"module '{__name__}' has no attribute {name!r}")
        from lfm2kit.cli.report import Report

        return Report


__all__ = ["Better", "Figure", "Report", "values"]
