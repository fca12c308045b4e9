"""Runs and shows the comparisons of `lfm2kit verify`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import typer
from rich.box import SIMPLE_HEAD
from rich.table import Column

from lfm2kit.building.loading import Setup, set_up
from lfm2kit.building.options import Options
from lfm2kit.building.plan import KINDS
from lfm2kit.checkpoint import Checkpoint
from lfm2kit.cli.console import STDOUT, only_said, progress, remark, show_table
from lfm2kit.cli.flags import flag
from lfm2kit.cli.report import Report
from lfm2kit.errors import WRONG_RESULT, Option
from lfm2kit.precisions import FP32
from lfm2kit.records.machine import machine_of
from lfm2kit.verifying import REFERENCE
from lfm2kit.verifying.differences import Difference
from lfm2kit.verifying.forced import CALLS, FORWARD
from lfm2kit.verifying.traced import recorded, verify_against_trace
from lfm2kit.verifying.traces import read_trace, write_trace
from lfm2kit.verifying.verification import Verification, verify_against

Ids = npt.NDArray[np.int32]


def against_backend(
    report: Report, checkpoint: Checkpoint, options: Options, ids: Ids, against: str
) -> None:
    """Compare each block with one of the backend `against`; exit with code 1 if one differs."""
    setup = set_up(checkpoint, options, tokens=ids.size)
    if against != REFERENCE:
        setup.create(against)
    for note in setup.notes():
        remark(note)
    forwards = len(CALLS if ids.shape[1] > 1 else CALLS[:1]) + 1
    with progress("comparing", forwards, "forwards") as advance:
        found = verify_against(setup, ids, against, done=lambda: advance(1))
    _conclude(report, setup, against, found, ids.shape)


def against_trace(report: Report, checkpoint: Checkpoint, options: Options, path: Path) -> None:
    """Compare each layer with what a trace has of it; exit with code 1 if one differs."""
    trace = read_trace(path, checkpoint.spec)
    setup, found = verify_against_trace(checkpoint, options, trace)
    _conclude(report, setup, str(path), found, trace.token_ids.shape)


def write(report: Report, checkpoint: Checkpoint, options: Options, ids: Ids, path: Path) -> None:
    """Write a trace of samples [n, seq_len] to a file."""
    setup, trace = recorded(checkpoint, options, ids)
    write_trace(path, trace)
    layers, (n, seq_len) = len(trace.layers), ids.shape
    report.line(
        f"{path}: what {layers} layers of {setup.plan} give for {n} samples of {seq_len} tokens"
    )
    report.machine = machine_of(setup)
    report.fields = {
        "model": str(checkpoint.path),
        "backend": str(setup.plan),
        "precision": setup.precision_of(setup.placed),
        "trace": str(path),
        "samples": n,
        "tokens_per_sample": seq_len,
    }
    report.write()


def _conclude(
    report: Report, setup: Setup, against: str, found: Verification, shape: tuple[int, ...]
) -> None:
    """Show and write what was found, and exit with code 1 if a block differs."""
    first = found.first
    if report.target != STDOUT:
        _show_blocks(found, f"{setup.plan} beside {against}")
    lines = [_equal(found, against)] if first is None else _different(setup, found, first, shape)
    for line in (*lines, *_not_compared(found, against)):
        report.line(line)
    _record(report, setup, against, found)
    with only_said(when=first is not None):
        report.write()
    if first is not None:
        raise typer.Exit(WRONG_RESULT)


def _verified(setup: Setup, ids: npt.NDArray[np.int32], against: str) -> Verification:
    forwards = len(CALLS if ids.shape[1] > 1 else CALLS[:1]) + 1
    with progress("comparing", forwards, "forwards") as advance:
        return verify_against(setup, ids, against, done=lambda: advance(1))


def _record(report: Report, setup: Setup, against: str, found: Verification) -> None:
    report.machine = machine_of(setup)
    report.figure("largest error", "", [found.nearest.error])
    report.fields = {
        "model": str(setup.checkpoint.path),
        "backend": str(setup.plan),
        "precision": setup.precision_of(setup.placed),
        "against": against,
        "blocks": [asdict(one) for one in found.differences],
        "drift": dict(found.drift),
        "not_compared": dict(found.alone),
        "parts": [asdict(one) for one in found.parts],
        "first": None if found.first is None else asdict(found.first),
    }


def _show_blocks(found: Verification, title: str) -> None:
    """Print a table with each block's largest error, in whichever forward it was."""
    show_table(
        (_row(one, found.drift.get(one.block)) for one in found.worst_calls()),
        Column("block", no_wrap=True),
        *map(Column, ("kind", "backend", "in a", "error", "allowed", "near ties", "drift", "")),
        title=title,
        box=SIMPLE_HEAD,
    )


def _row(one: Difference, drift: float | None) -> list[str]:
    return [
        one.block,
        one.kind,
        one.backend,
        one.call,
        f"{one.error:.1e}",
        f"{one.allowed:.0e}",
        str(one.near_ties or ""),
        "" if drift is None else f"{drift:.1e}",
        "" if one.is_within else "differs",
    ]


def _equal(found: Verification, against: str) -> str:
    """Say that nothing differs, and how much of what is allowed was needed."""
    one = found.nearest
    return (
        f"EQUAL: every block is as near to that of '{against}' as its precision promises; the "
        f"largest error is {one.error:.1e} of {one.allowed:.0e} that are allowed, of {one.block}"
    )


def _different(
    setup: Setup, found: Verification, first: Difference, shape: tuple[int, ...]
) -> Iterator[str]:
    """Yield lines: what differs first, where, what of it, and what to type next."""
    yield (
        f"DIFFERENT: {first.block}, the {first.kind} block of backend '{first.backend}', is the "
        f"first that differs, in a {first.call}: {first.place(shape)} is {first.got:.7g} and "
        f"should be {first.want:.7g}; the error is {first.error:.1e}, allowed is "
        f"{first.allowed:.0e}"
    )
    if first.call != FORWARD:
        yield "without a state it is right: look at its new_state, and at what it keeps of a prompt"
    for part in found.parts:
        how = "is right" if part.is_within else f"differs by {part.error:.1e}"
        yield f"  {part.block}, built alone, {how}"
    if found.parts and all(part.is_within for part in found.parts):
        yield "each part is right alone, so what joins them inside the block is not"
    if first.near_ties:
        yield (
            f"{first.near_ties} more rows were left out: a router is so near a tie there that "
            "either choice is right"
        )
    yield from _next_commands(setup, found, first)


def _not_compared(found: Verification, against: str) -> Iterator[str]:
    """Yield a line if there are blocks that the other side does not build."""
    if found.alone:
        names, (why, *_) = list(found.alone), found.alone.values()
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"not compared: {names[0]}{more}, which '{against}' does not build: {why}"


def _next_commands(setup: Setup, found: Verification, first: Difference) -> Iterator[str]:
    worst = next((part for part in found.parts if not part.is_within), first)
    name, _, own = first.backend.partition(":")
    precision = own or setup.context.precision
    options = [
        *([Option("precision", precision)] if precision != FP32.name else []),
        Option("only", f"{worst.kind}()"),
    ]
    yield f"next: lfm2kit backends check {name} {' '.join(map(flag, options))}"
    plan = f"{setup.plan},{_rule(worst)}={REFERENCE}:{FP32.name}"
    yield f"or, to see the blocks behind it: lfm2kit verify {flag(Option('backend', plan))}"


def _rule(one: Difference) -> str:
    """Return how a plan names a block: its layer, its kind, or both."""
    words = one.block.split(".")
    layer = words[1] if words[0] == "layers" else None
    kind = one.kind if one.kind in KINDS else None
    return ".".join(filter(None, (layer, kind)))
