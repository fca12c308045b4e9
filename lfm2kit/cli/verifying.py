"""Runs and shows the comparisons of `lfm2kit verify`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

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
from lfm2kit.cli.preparing import Request
from lfm2kit.cli.report import Report
from lfm2kit.cli.rewrite_options import option_of
from lfm2kit.errors import WRONG_RESULT, Lfm2kitError, Option
from lfm2kit.precisions import FP32
from lfm2kit.records.machine import machine_of
from lfm2kit.verifying import REFERENCE
from lfm2kit.verifying.differences import Difference
from lfm2kit.verifying.forced import CALLS, FORWARD
from lfm2kit.verifying.traced import recorded, verify_against_trace
from lfm2kit.verifying.traces import read_trace, write_trace
from lfm2kit.verifying.verification import Verification, verify_against

Ids = npt.NDArray[np.int32]


class Compared(NamedTuple):
    """What was asked, and what was found."""

    setup: Setup
    request: Request
    against: str
    shape: tuple[int, ...]  # of the samples: n, seq_len
    found: Verification


def against_backend(
    report: Report, checkpoint: Checkpoint, request: Request, ids: Ids, against: str
) -> None:
    """Compare each block with one of the backend `against`; exit with code 1 if one differs."""
    setup = set_up(checkpoint, request.options, tokens=ids.size)
    if against.partition(":")[0] != REFERENCE:
        setup.create(against)
    for note in setup.notes():
        remark(note)
    forwards = len(CALLS if ids.shape[1] > 1 else CALLS[:1]) + 1
    with progress("comparing", forwards, "forwards") as advance:
        found = verify_against(setup, ids, against, done=lambda: advance(1))
    _conclude(report, Compared(setup, request, against, ids.shape, found))


def against_trace(report: Report, checkpoint: Checkpoint, request: Request, path: Path) -> None:
    """Compare each layer with what a trace has of it; exit with code 1 if one differs."""
    trace = read_trace(path, checkpoint.spec)
    for name in request.options.rewrites:
        raise Lfm2kitError(f"{option_of(name)}: a trace has all rows; leave it out")
    setup, found = verify_against_trace(checkpoint, request.options, trace)
    _conclude(report, Compared(setup, request, str(path), trace.token_ids.shape, found))


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


def _conclude(report: Report, compared: Compared) -> None:
    """Show and write what was found, and exit with code 1 if a block differs."""
    found = compared.found
    if report.target != STDOUT:
        _show_blocks(found, f"{compared.setup.plan} beside {compared.against}")
    for line in verdict(found, compared.against, compared.shape):
        report.line(line)
    if found.first is not None:
        for line in _next_commands(compared, found.first):
            report.line(line)
    _record(report, compared)
    with only_said(when=found.first is not None):
        report.write()
    if found.first is not None:
        raise typer.Exit(WRONG_RESULT)


def verdict(found: Verification, against: str, shape: tuple[int, ...]) -> Iterator[str]:
    """Yield lines: whether a block differs, which one and where, and what was not compared."""
    yield from [_equal(found, against)] if found.first is None else _different(found, shape)
    yield from _not_compared(found, against)


def _record(report: Report, compared: Compared) -> None:
    setup, found = compared.setup, compared.found
    report.machine = machine_of(setup)
    report.figure("largest error", "", [found.nearest.error])
    report.fields = {
        "model": str(setup.checkpoint.path),
        "backend": str(setup.plan),
        "precision": setup.precision_of(setup.placed),
        "against": compared.against,
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
    """Say that nothing differs, and which block comes nearest to its limit."""
    names = {one.block for one in found.differences} - set(found.undecided)
    there = len(names) + len(found.undecided) + len(found.alone)
    count = f"{len(names)} of {there}" if len(names) < there else f"all {there}"
    one = found.nearest
    return (
        f"EQUAL: {count} blocks are as near to those of '{against}' as its precision promises; "
        f"{one.block} comes nearest to its limit: its error is {one.error:.1e}, and "
        f"{one.allowed:.0e} is allowed"
    )


def _different(found: Verification, shape: tuple[int, ...]) -> Iterator[str]:
    """Yield lines: what differs first, where, and what of it."""
    first = found.first
    assert first is not None
    yield (
        f"DIFFERENT: {first.block}, the {first.kind} block of backend '{first.backend}', is the "
        f"first that differs, in a {first.call}: {first.place(shape)} is {first.got:.7g} and "
        f"should be {first.want:.7g}; the error is {first.error:.1e}, allowed is "
        f"{first.allowed:.0e}"
    )
    if first.call != FORWARD:
        yield f"in a forward of whole samples it is right, and wrong in a {first.call} with a state"
    for part in found.parts:
        how = "is right" if part.is_within else f"differs by {part.error:.1e}"
        yield f"  {part.block}, built alone, {how}"
    if found.parts and all(part.is_within for part in found.parts):
        yield "each part is right alone, so what joins them inside the block is not"


def _not_compared(found: Verification, against: str) -> Iterator[str]:
    """Yield what was left out: blocks that the other side lacks, and those near ties."""
    whys: dict[str, list[str]] = {}
    for name, why in found.alone.items():
        whys.setdefault(why, []).append(name)
    for why, names in whys.items():
        yield f"not compared: {_in_short(names)}, which '{against}' does not build: {why}"
    if found.undecided:
        yield (
            f"not compared: {_in_short(found.undecided)}: a router is near a tie in each of its "
            "rows, and may choose either way; give more samples"
        )
    if rows := sum(one.near_ties for one in found.differences if not one.is_undecided):
        yield f"{rows} rows were left out: a router is near a tie there, and may choose either way"


def _in_short(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _next_commands(compared: Compared, first: Difference) -> Iterator[str]:
    """Yield what to type to see more, with the options of this command."""
    setup, request = compared.setup, compared.request
    worst = next((part for part in compared.found.parts if not part.is_within), first)
    name, _, own = first.backend.partition(":")
    precision = own or setup.context.precision
    others = [Option("precision", precision)] if precision != FP32.name else []
    options = [*others, Option("only", f"{worst.kind}()")]
    yield f"next: lfm2kit backends check {name} {' '.join(map(flag, options))}"
    plan = f"{setup.plan},{_rule(worst)}={REFERENCE}:{FP32.name}"
    samples = {name: getattr(request, name) for name in ("n", "inputs", "random_inputs")}
    given = {"backend": plan, **_given(request.options), **samples, "against": compared.against}
    usual = {"against": REFERENCE, "n": None}
    options = [Option(k, v) for k, v in given.items() if v is not None and v != usual.get(k)]
    yield f"or, to see the blocks behind it: lfm2kit verify {' '.join(map(flag, options))}"


def _given(options: Options) -> dict[str, Any]:
    """Return the options of a model that are not as usual, but for its plan, by name."""
    usual = Options()
    names = ("model", "precision", "threads", "n_cpu_moe", "gpu_memory", "seed")
    pairs = {name: getattr(options, name) for name in names}
    return {name: value for name, value in pairs.items() if value != getattr(usual, name)}


def _rule(one: Difference) -> str:
    """Return how a plan names a block: its layer, its kind, or both."""
    words = one.block.split(".")
    layer = words[1] if words[0] == "layers" else None
    kind = one.kind if one.kind in KINDS else None
    return ".".join(filter(None, (layer, kind)))
