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
from lfm2kit.verifying import REFERENCE

KIND_COLUMNS = (
    "kind", "backend", "blocks", "ms", "% of all", "GFLOP/s", "GB/s", "% of roofline",
)  # fmt: skip


def show(report: Report, found: Found) -> None:
    """Print where the time goes: by kind of block, and by layer."""
    profile, setup = found.profile, found.setup
    milliseconds = 1e3 * profile.seconds
    report.line(f"{setup.plan}: {found.asked.test} takes {milliseconds:.4g} ms")
    if report.target != STDOUT:
        _show_kinds(found)
        _show_layers(found)
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
    """Print a row for each kind of block.

    What lies between blocks is unknown where it is less than the noise, or where memories overlap.
    """
    whole = found.profile.seconds
    rest = whole - found.inside
    between = [f"{1e3 * rest:.4g}", _percent(rest / whole)] if rest >= 0 else ["-", "-"]
    rows = [_kind_row(total, whole) for total in found.totals]
    rows.append(["between blocks", "", "", *between, "", "", ""])
    show_table(rows, *map(Column, KIND_COLUMNS), box=SIMPLE_HEAD)


def _kind_row(total: Total, whole: float) -> list[str]:
    return [
        total.kind,
        total.backend,
        str(total.blocks),
        f"{1e3 * total.seconds:.4g}",
        _percent(total.seconds / whole),
        f"{total.work.flops / total.seconds / 1e9:.4g}",
        f"{total.work.bytes / total.seconds / 1e9:.4g}",
        "-" if total.roofline is None else _percent(total.roofline),
    ]


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
