"""`lfm2kit plan`: what would be built, block by block, before a weight is read."""

from __future__ import annotations

from typing import Annotated, Any

from rich.box import SIMPLE_HEAD
from rich.table import Column

from lfm2kit.backend import KeepsFormats
from lfm2kit.capacity import size
from lfm2kit.cli import options
from lfm2kit.cli.console import Report, show_table
from lfm2kit.formats import fate
from lfm2kit.loading import Setup, set_up
from lfm2kit.machine import memory_limits
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
    report.check_apart(options.files_of(checkpoint, plan))
    context = options.context_for(precision, threads, World())
    chosen = options.chosen_plan(backend, plan)
    setup = set_up(checkpoint, chosen, context=context, n_cpu_moe=n_cpu_moe, trim=trim)
    rows = [_row(leaf, setup, tokens) for leaf in setup.placed.leaves()]
    totals = _totals(setup, tokens)
    report.fields = {
        "model": str(checkpoint.path),
        "plan": str(setup.plan),
        "precision": precision,
        "blocks": rows,
        "totals": totals,
        "copies": setup.placed.copies(),
        "rows_kept": _rows_kept(setup),
        "free_bytes": setup.sizes.free(setup.placed),
        "host_limits": {bound.name: bound._asdict() for bound in memory_limits()},
        "shortage": setup.shortage(tokens),
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
        "formats": _formats(leaf, setup),
        "weight_bytes": setup.stored_bytes(leaf),
        "kept_bytes": setup.sizes.of(leaf, 0),
        "workspace_bytes": setup.sizes.of(leaf, tokens),
        "copy": f"{leaf.outer.name} <-> {leaf.memory.name}" if leaf.is_copied else None,
    }


def _formats(leaf: Placed, setup: Setup) -> list[str] | None:
    """Says in which formats a block keeps its matrices, or its vectors if it has no matrix.

    None if its backend does not say.
    """
    assert leaf.backend is not None  # a leaf's always is
    backend = setup.create(leaf.backend)
    if not isinstance(backend, KeepsFormats):
        return None
    weights = setup.checkpoint.weights.scope(leaf.scope)
    kept = backend.kept_formats(leaf.spec, weights)
    matrices = [name for name in kept if len(weights[name].shape) == 2]
    fates = (fate(weights[name].format, kept[name]) for name in matrices or kept)
    return list(dict.fromkeys(fates))


def _rows_kept(setup: Setup) -> dict[str, int]:
    """What `--trim` leaves of a sample, by layer."""
    model = setup.placed.spec
    layers = enumerate(model.layers if isinstance(model, TrimmedModel) else ())
    return {f"layers.{i}": one.rows_out for i, one in layers if isinstance(one, TrimmedLayer)}


def _totals(setup: Setup, tokens: int) -> dict[str, dict[str, int]]:
    """Bytes per memory.  A tied head's weights count again: the block may pack them anew."""
    leaves: dict[str, list[Placed]] = {}
    for leaf in setup.placed.leaves():
        leaves.setdefault(leaf.memory.name, []).append(leaf)
    return {
        memory: {
            "weight_bytes": sum(setup.stored_bytes(leaf) for leaf in here),
            "kept_bytes": setup.sizes.needed(here, 0),
            "workspace_bytes": setup.sizes.needed(here, tokens),
        }
        for memory, here in leaves.items()
    }


def _show(report: Report, setup: Setup, tokens: int) -> None:
    report.line(f"{setup.checkpoint.path}: {setup.plan}")
    headings = ("block", "spec", "backend", "memory", "formats", "copy")
    sizes = ("weights", "kept", f"at {tokens} tokens")
    show_table(
        [_texts(row) for row in report.fields["blocks"]],
        *(Column(heading, overflow="fold") for heading in headings),
        *(Column(heading, justify="right", no_wrap=True) for heading in sizes),
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    free = setup.sizes.free(setup.placed)
    for memory, total in report.fields["totals"].items():
        weights, kept, at_most = (size(count) for count in total.values())
        left = f"; {_size(free[memory])} are free" if memory in free else ""
        taken = f"{kept} of memory kept, {at_most} with {tokens} tokens at once"
        report.line(f"{memory}: {weights} of weights as stored, {taken}{left}")
    for bound in memory_limits():
        report.line(f"{bound.name}: {size(bound.free)} free of {size(bound.limit)}")
    if (shortage := setup.shortage(tokens)) is not None:
        report.line(shortage)
    report.line(f"copies between memories in a forward: {setup.placed.copies()}")
    for layer, rows_kept in _rows_kept(setup).items():
        report.line(f"{layer}: {rows_kept} of a sample's rows go on after its operator")
    for note in setup.notes():
        report.line(note)


def _texts(row: dict[str, Any]) -> list[str]:
    formats = "?" if row["formats"] is None else ", ".join(row["formats"])
    texts = [*(row[key] for key in ("block", "spec", "backend", "memory")), formats]
    texts.append(row["copy"] or "")
    kinds = ("weight_bytes", "kept_bytes", "workspace_bytes")
    return [*texts, *(_size(row[kind]) for kind in kinds)]


def _size(count: int | None) -> str:
    return "?" if count is None else size(count)
