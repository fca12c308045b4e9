"""The tables of `lfm2kit profile`: kinds of blocks, and layers."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Column

from lfm2kit.cli.console import STDOUT, show_table
from lfm2kit.cli.profiling import Found
from lfm2kit.cli.report import Report
from lfm2kit.cli.verifying import verdict
from lfm2kit.profiling.figures import Part, Total
from lfm2kit.profiling.forwards import MOST_OVERHEAD, Profile
from lfm2kit.profiling.page.scaling import COLUMNS
from lfm2kit.profiling.page.scaling import rows as rows_of
from lfm2kit.profiling.ranks import OfRank, slowest
from lfm2kit.verifying import REFERENCE

KIND_COLUMNS = (
    "kind", "backend", "blocks", "ms", "% of all", "GFLOP/s", "GB/s", "% of roofline",
)  # fmt: skip


def show(report: Report, found: Found) -> None:
    """Print where the time goes: by kind of block, and by layer."""
    profile, setup = found.profile, found.setup
    milliseconds = 1e3 * profile.seconds
    report.line(f"{setup.plan}: {found.test} takes {milliseconds:.4g} ms")
    if report.target != STDOUT:
        _show_kinds(found)
        _show_layers(found)
        if len(found.ranks) > 1:
            _show_ranks(found)
        if found.curves:
            _show_scaling(found)
    if found.loads.max_over_mean is not None:
        report.line(f"rows of experts, max/mean over ranks: {found.loads.max_over_mean:.2f}")
    report.line(of_marks(profile))
    if found.errors is not None:
        for line in verdict(found.errors, REFERENCE, found.samples):
            report.line(line)


def of_marks(profile: Profile) -> str:
    """Say what the marks cost."""
    where = "in all blocks" if profile.groups == 1 else "in the blocks of one layer at a time"
    limit = f" (more than {MOST_OVERHEAD:.0%})" if profile.overhead > MOST_OVERHEAD else ""
    return f"marks {where} cost {profile.overhead:.1%} of a forward{limit}"


def _show_kinds(found: Found) -> None:
    """Print a row for each kind of block: an average rank's, and the slowest one's time of it.

    What lies between blocks is unknown where it is less than the noise, or where memories overlap.
    """
    whole, ranks = found.profile.seconds, found.ranks
    rest = whole - sum(total.seconds for total in found.totals)
    between = [f"{1e3 * rest:.4g}", _percent(rest / whole)] if rest >= 0 else ["-", "-"]
    rows = [_kind_row(total, whole) for total in found.totals]
    rows.append(["between blocks", "", "", *between, "", "", ""])
    columns = list(KIND_COLUMNS)
    if len(ranks) > 1:
        longest = slowest(ranks)
        columns.append("slowest, ms")
        for row, total in zip(rows, found.totals, strict=False):
            row.append(_milliseconds(longest.get((total.kind, total.backend), 0.0)))
    show_table(rows, *map(Column, columns), box=SIMPLE_HEAD)


def _kind_row(total: Total, whole: float) -> list[str]:
    rates = (total.work.flops, total.work.bytes) if total.backend and total.seconds else ()
    return [
        total.kind,
        total.backend,
        str(total.blocks),
        _milliseconds(total.seconds),
        _percent(total.seconds / whole),
        *([f"{one / total.seconds / 1e9:.4g}" for one in rates] or ["-", "-"]),
        "-" if total.roofline is None else _percent(total.roofline),
    ]


def _show_ranks(found: Found) -> None:
    """Print a row for each rank: what takes the milliseconds until the last rank has ended."""
    show_table(
        (
            [str(one.rank), str(one.samples), *map(_milliseconds, _times(one))]
            for one in found.ranks
        ),
        *map(Column, ("rank", "samples", "blocks", "exchange", "waits", "between")),
        box=SIMPLE_HEAD,
    )


def _show_scaling(found: Found) -> None:
    """Print a row for each number of ranks of a record."""
    some = (row for curve in found.curves for row in rows_of(curve))
    show_table(some, *map(Column, COLUMNS), box=SIMPLE_HEAD)


def _times(rank: OfRank) -> tuple[float, ...]:
    return rank.blocks, rank.exchange, rank.waits, max(rank.between, 0.0)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.4g}"


def _show_layers(found: Found) -> None:
    """Print a row for each layer: its parts in microseconds, in the order of the forward."""
    layers: dict[int, list[Part]] = {}
    for part in found.parts:
        if part.layer is not None:
            layers.setdefault(part.layer, []).append(part)
    show_table(
        (
            [str(layer), f"{1e6 * sum(p.seconds for p in some):.4g}", _in_words(some)]
            for layer, some in layers.items()
        ),
        *map(Column, ("layer", "us", "of which")),
        box=SIMPLE_HEAD,
    )


def _in_words(parts: Sequence[Part]) -> str:
    return ", ".join(f"{part.kind} {1e6 * part.seconds:.3g}" for part in parts)


def _percent(share: float) -> str:
    return f"{100 * share:.3g}"
