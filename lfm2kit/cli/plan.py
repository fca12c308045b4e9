"""`lfm2kit plan`: what would be built, block by block, before a weight is read."""

from __future__ import annotations

from typing import Annotated, Any

from rich.box import SIMPLE_HEAD
from rich.table import Column

from lfm2kit.capacity import free_bytes, workspace_bytes
from lfm2kit.cli import options
from lfm2kit.cli.console import Report, show_table
from lfm2kit.loading import Setup, set_up
from lfm2kit.placement import Placed
from lfm2kit.transport import World
from lfm2kit.trim import TrimmedLayer, TrimmedModel


def plan(
    model: options.ModelOption = "tiny",
    backend: options.BackendOption = None,
    plan: options.PlanOption = None,
    precision: options.PrecisionOption = "fp32",
    threads: options.ThreadsOption = None,
    n_cpu_moe: options.CpuMoeOption = 0,
    trim: options.TrimOption = False,
    tokens: Annotated[
        int, options.whole_number("--tokens", help="Tokens of a forward, for the workspace.")
    ] = 2048,
    json: options.JsonOption = None,
) -> None:
    """Shows each block's backend, memory, bytes and copies; nothing is loaded."""
    report = Report(json)
    checkpoint = options.open_model(model)
    context = options.context_for(precision, threads, World())
    chosen = options.chosen_plan(backend, plan)
    setup = set_up(checkpoint, chosen, context=context, n_cpu_moe=n_cpu_moe, trim=trim)
    rows = [_row(leaf, setup, tokens) for leaf in setup.placed.leaves()]
    totals = _totals(rows)
    report.fields = {
        "model": str(checkpoint.path),
        "plan": str(setup.plan),
        "precision": precision,
        "blocks": rows,
        "totals": totals,
        "copies": setup.placed.copies(),
        "rows_kept": _rows_kept(setup),
        "free_bytes": free_bytes(setup.placed),
        "shortage": setup.shortage(),
        "notes": list(setup.notes()),
    }
    if json != "-":
        _show(report, setup, tokens)
    report.write()


def _row(leaf: Placed, setup: Setup, tokens: int) -> dict[str, Any]:
    return {
        "block": leaf.name,
        "spec": type(leaf.spec).__name__,
        "backend": leaf.backend,
        "memory": leaf.memory.name,
        "weight_bytes": setup.stored_bytes(leaf),
        "workspace_bytes": workspace_bytes(leaf, setup.create, tokens),
        "copy": f"{leaf.outer.name} <-> {leaf.memory.name}" if leaf.is_copied else None,
    }


def _rows_kept(setup: Setup) -> dict[str, int]:
    """What `--trim` leaves of a sample, by layer."""
    model = setup.placed.spec
    layers = enumerate(model.layers if isinstance(model, TrimmedModel) else ())
    return {f"layers.{i}": one.rows_out for i, one in layers if isinstance(one, TrimmedLayer)}


def _totals(rows: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Bytes per memory.  A tied head's weights count again: the block may pack them anew."""
    totals: dict[str, dict[str, int]] = {}
    for row in rows:
        total = totals.setdefault(row["memory"], {"weight_bytes": 0, "workspace_bytes": 0})
        total["weight_bytes"] += row["weight_bytes"]
        total["workspace_bytes"] += row["workspace_bytes"] or 0
    return totals


def _show(report: Report, setup: Setup, tokens: int) -> None:
    report.line(f"{setup.checkpoint.path}: {setup.plan}")
    headings = ("block", "spec", "backend", "memory", "copy")
    show_table(
        [_texts(row) for row in report.fields["blocks"]],
        *(Column(heading, overflow="fold") for heading in headings),
        *(Column(heading, justify="right", no_wrap=True) for heading in ("weights", "workspace")),
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    free = free_bytes(setup.placed)
    for memory, total in report.fields["totals"].items():
        sizes = f"{_size(total['weight_bytes'])} of weights as stored"
        left = f"; {_size(free[memory])} are free" if memory in free else ""
        workspace = f"{_size(total['workspace_bytes'])} of workspace at {tokens} tokens"
        report.line(f"{memory}: {sizes}, {workspace}{left}")
    if (shortage := setup.shortage()) is not None:
        report.line(shortage)
    report.line(f"copies between memories in a forward: {setup.placed.copies()}")
    for layer, kept in _rows_kept(setup).items():
        report.line(f"{layer}: {kept} of a sample's rows go on after its operator")
    for note in setup.notes():
        report.line(note)


def _texts(row: dict[str, Any]) -> list[str]:
    texts = [row["block"], row["spec"], row["backend"], row["memory"], row["copy"] or ""]
    return [*texts, _size(row["weight_bytes"]), _size(row["workspace_bytes"])]


def _size(count: int | None) -> str:
    if count is None:
        return "?"
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count = count / 1000  # type: ignore[assignment]
    return f"{count:.3g} GB"
