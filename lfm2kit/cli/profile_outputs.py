"""Writes what `lfm2kit profile` has measured: the record, a trace, and a page with pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lfm2kit.backend import Ceilings
from lfm2kit.cli.console import remark, write_document
from lfm2kit.cli.profile_tables import of_marks
from lfm2kit.cli.profiling import Found
from lfm2kit.cli.report import Report
from lfm2kit.outputs.files import replaced
from lfm2kit.profiling.figures import Part
from lfm2kit.profiling.page.facts import facts_of
from lfm2kit.profiling.page.heat import heat
from lfm2kit.profiling.page.ladder import ladder
from lfm2kit.profiling.page.page import page
from lfm2kit.profiling.page.rank_bars import rank_bars
from lfm2kit.profiling.page.roofline import roofline
from lfm2kit.profiling.page.scaling import scaling
from lfm2kit.profiling.page.strip import strip
from lfm2kit.profiling.page.timeline import timeline
from lfm2kit.profiling.ranks import OfRank
from lfm2kit.profiling.scaling import Curve
from lfm2kit.profiling.trace_events import trace_events
from lfm2kit.records.machine import machine_of
from lfm2kit.verifying.verification import Verification


def deliver(report: Report, found: Found) -> None:
    """Write the document, the trace and the page that were asked for."""
    _record(report, found)
    trace, html = found.asked.files.trace, found.asked.files.html
    if trace is not None:
        write_document(trace, trace_events(found.ranks))
    if html is not None:
        with replaced(html, remark) as file:
            file.write(_page(found, report).encode())
    report.write()


def _page(found: Found, report: Report) -> str:
    """Return the page with the pictures of what was measured."""
    pictures = [strip(found.parts), timeline(found.ranks)]
    if len(found.ranks) > 1:
        pictures.insert(1, rank_bars(found.ranks))
    if found.ceilings is not None:
        pictures.insert(1, roofline(found.totals, found.ceilings))
    if found.loads:
        pictures.append(heat(found.loads))
    if found.curves:
        pictures.append(scaling(found.curves))
    if found.errors is not None:
        pictures.append(ladder(found.errors))
    return page(f"{found.setup.plan}: {found.test}", _facts(found), pictures, report.record())


def _facts(found: Found) -> dict[str, str]:
    setup, profile = found.setup, found.profile
    return {
        "model": str(setup.checkpoint.path),
        "precision": setup.precision_of(setup.placed),
        "time": f"{1e3 * profile.seconds:.4g} ms, the median of {len(profile.plain)} forwards",
        "marks": of_marks(profile),
        **facts_of(setup.context),
    }


def _record(report: Report, found: Found) -> None:
    setup, profile = found.setup, found.profile
    report.machine = machine_of(setup)
    report.figure("time", "s", profile.plain, "lower")
    report.figure("time with marks", "s", profile.marked, "lower")
    report.fields = {
        "model": str(setup.checkpoint.path),
        "backend": str(setup.plan),
        "precision": setup.precision_of(setup.placed),
        "test": found.test,
        "groups": profile.groups,
        "ceilings": None if found.ceilings is None else found.ceilings._asdict(),
        "expert_loads": _by_layer(found.loads.experts),
        "rank_loads": _by_layer(found.loads.ranks),
        "rows_max_over_mean": found.loads.max_over_mean,
        "experts_of_ranks": _by_layer(found.loads.owners),
        "ranks": [_rank(one) for one in found.ranks],
        "parts": [_part(part, found.ceilings) for part in found.parts],
        "scaling": [point for curve in found.curves for point in _points(curve)],
        "errors": None if found.errors is None else _errors(found.errors),
        "kinds": [asdict(total) | {"work": total.work._asdict()} for total in found.totals],
    }


def _by_layer(numbers: Mapping[int, Sequence[int]]) -> dict[str, list[int]]:
    return {str(layer): list(some) for layer, some in numbers.items()}


def _rank(one: OfRank) -> dict[str, Any]:
    return {
        "rank": one.rank,
        "machine": one.machine,
        "samples": one.samples,
        "blocks": one.blocks,
        "exchange": one.exchange,
        "waits": one.waits,
        "between": one.between,
        "clock_ahead": one.ahead.seconds,
        "clock_error": one.ahead.error,
        "parts": [
            {"name": part.name, "kind": part.kind, "memory": part.memory, "seconds": part.seconds}
            for part in one.parts
        ],
    }


def _points(curve: Curve) -> Iterator[dict[str, Any]]:
    for point in curve.points:
        yield {
            "test": curve.name,
            "ranks": point.ranks,
            "samples_per_second": point.throughput,
            "ideal": curve.ideal(point),
            "efficiency": curve.efficiency(point),
        }


def _errors(found: Verification) -> list[dict[str, Any]]:
    """Return the largest error of each block, and its drift."""
    return [asdict(one) | {"drift": found.drift.get(one.block)} for one in found.worst_calls()]


def _part(part: Part, ceilings: Ceilings | None) -> dict[str, Any]:
    work = part.work._asdict()
    return asdict(part) | {"layer": part.layer, "work": work, "roofline": part.roofline(ceilings)}
