"""Shows who holds which expert by a load, and how even the ranks' rows are expected to be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Column

from lfm2kit import specs
from lfm2kit.building.loading import Setup
from lfm2kit.cli.console import show_table
from lfm2kit.cli.report import Report
from lfm2kit.ranks.balancing import expected_rows, max_over_mean
from lfm2kit.rewrites import owners_by_layer
from lfm2kit.rewrites.ids_in_words import ranges
from lfm2kit.transport import Owners, evenly, held_by_all, held_once


def fields_of(setup: Setup) -> dict[str, Any] | None:
    """Return what is expected of the ranks of a group, by layer; None without a load for them.

    Rows are those of the load's tokens, if each rank of the group has the same part of these.
    """
    assert isinstance(setup.placed.spec, specs.Model)
    owners = owners_by_layer(setup.placed.spec)
    if setup.load is None or not owners:
        return None
    counts = {one.layer: one.counts for one in setup.load.layers}
    rows = {i: expected_rows(counts[i], table) for i, table in owners.items()}
    return {
        "rows_max_over_mean": max_over_mean(rows.values()),
        "rows_max_over_mean_in_order": max_over_mean(
            expected_rows(counts[i], _in_order(table)) for i, table in owners.items()
        ),
        "layers": [
            {
                "layer": f"layers.{i}",
                "rows_max_over_mean": max_over_mean([rows[i]]),
                "rows_by_rank": rows[i],
                "on_all_ranks": _on_all(table),
                "held_by_rank": held_by_all(table),
            }
            for i, table in owners.items()
        ],
    }


def _in_order(owners: Owners) -> Owners:
    """Return the owners of as many experts as there are without a load."""
    return held_once(evenly(len(owners), len(owners[0])), len(owners))


def _on_all(owners: Owners) -> list[int]:
    return sorted(set.intersection(*map(set, held_by_all(owners))))


def show(report: Report, expected: Mapping[str, Any]) -> None:
    """Print the expected max/mean, and a row for each layer."""
    both = (_ratio(expected[key]) for key in ("rows_max_over_mean", "rows_max_over_mean_in_order"))
    report.line("by the load, rows max/mean {} (without it {}); in each group:".format(*both))
    show_table(
        [list(_row(layer)) for layer in expected["layers"]],
        Column("layer"),
        Column("max/mean", justify="right"),
        Column("on all ranks", overflow="fold"),
        Column("on one rank", overflow="fold"),
        box=SIMPLE_HEAD,
        pad_edge=False,
    )


def _row(layer: Mapping[str, Any]) -> Iterator[str]:
    on_all = layer["on_all_ranks"]
    held = ([e for e in ids if e not in on_all] for ids in layer["held_by_rank"])
    yield layer["layer"]
    yield _ratio(layer["rows_max_over_mean"])
    yield ranges(on_all) or "none"
    yield "; ".join(f"{rank}: {ranges(ids) or 'none'}" for rank, ids in enumerate(held))


def _ratio(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"
