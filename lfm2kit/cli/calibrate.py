"""`lfm2kit calibrate`: how fast this machine computes experts and moves them, as a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Column

from lfm2kit.building.byte_counts import size
from lfm2kit.building.curves import Curve
from lfm2kit.building.kept_rates import LONGEST_TURN, turn, with_kept
from lfm2kit.building.loading import Setup, set_up
from lfm2kit.building.options import About, Options
from lfm2kit.building.rank_rates import ExchangeKey
from lfm2kit.building.rates import Calibration, Side
from lfm2kit.checkpoint import check_no_part
from lfm2kit.cli.bench import TOO_MUCH_WAITING
from lfm2kit.cli.console import STDOUT, progress, remark, show_table, write_document
from lfm2kit.cli.flags import flag
from lfm2kit.cli.options import (
    OF_RANKS,
    IndependentOption,
    JsonOption,
    TransportOption,
    Without,
    files_of,
    flags,
    open_model,
    spread,
)
from lfm2kit.cli.preparing import check_same_file, place_of, shared_paths
from lfm2kit.cli.ranks import (
    agreed,
    check_independent,
    check_size,
    ending_all_ranks,
    joined_job,
    leave_to_ranks,
    refuse_options,
)
from lfm2kit.cli.report import Output
from lfm2kit.errors import Lfm2kitError, Option
from lfm2kit.measuring.calibration import Measurable, calibrated, measurable, steps
from lfm2kit.outputs.files import check_target
from lfm2kit.outputs.targets import check_apart
from lfm2kit.progress import step
from lfm2kit.ranks.joining import facts_of
from lfm2kit.ranks.launchers import DEFAULT_TRANSPORT
from lfm2kit.transport import Transport

KEPT = "a file for this machine, beside the compiled kernels"

# Options that say where experts go: what is measured does not depend on it.
OF_A_PLACEMENT = (
    "n_cpu_moe",
    "gpu_memory",
    "streamed_experts",
    "rates",
    "load",
    *OF_RANKS,
    "rewrites",
    "check",
)


@partial(spread, refused=refuse_options)
def calibrate(
    options: Annotated[Options, Without(OF_A_PLACEMENT)],
    output: Annotated[
        Path | None,
        flags("output", About("Where to write the rates.", KEPT, metavar="FILE"), is_path=True),
    ] = None,
    ranks: Annotated[
        int | None,
        flags("ranks", About("Number of processes that measure at the same time.", least=1)),
    ] = None,
    transport: TransportOption = DEFAULT_TRANSPORT,
    independent: IndependentOption = False,
    json: JsonOption = None,
) -> None:
    """Measure how fast experts, other blocks and ranks' exchanges are, in less than a minute."""
    check_independent(ranks, independent)
    job = None if independent else joined_job(transport)
    with ending_all_ranks(job):
        prepared = agreed(
            job,
            lambda: _prepared(options, output, json, job, ranks),
            lambda found: facts_of(found.setup, lambda name: flag(Option(name))),
        )
        leave_to_ranks(job, transport, ranks)
        _measure(prepared, output, is_first=job is None or job.world.rank == 0)


class _Prepared(NamedTuple):
    """What is to be measured, and where the result goes."""

    report: Output
    setup: Setup
    there: list[Measurable]


def _prepared(
    options: Options,
    output: Path | None,
    json: str | None,
    job: Transport | None,
    ranks: int | None,
) -> _Prepared:
    """Find and check everything before anything is measured."""
    check_size(job, ranks)
    if job is not None or (ranks or 1) > 1:
        check_same_file({**shared_paths(options, json), "--output": output})
    world = place_of(job, ranks)
    report = Output(json if world.rank == 0 else None)
    checkpoint = open_model(options)
    if world.rank == 0:
        if output is not None:
            check_target("--output", output)
            check_no_part("--output", output)
        check_apart({"--output": output, "--json": report.path}, files_of(checkpoint, options))
    setup = set_up(checkpoint, options, world=world, transport=job)
    return _Prepared(report, setup, measurable(setup))


def _measure(prepared: _Prepared, output: Path | None, *, is_first: bool) -> None:
    """Measure, on every rank; the first one shows and writes the rates."""
    report, setup, there = prepared
    if not is_first:
        calibrated(setup, there)
        return
    for note in setup.notes():
        remark(note)
    step("waiting for another calibration", LONGEST_TURN)
    with turn(remark):
        total = steps(setup, there)
        with progress("measuring", total, "steps") as advance:
            calibration, waited = calibrated(setup, there, lambda: advance(1))
        try:
            if report.target != STDOUT:
                _show(report, calibration)
        finally:  # whatever becomes of the printed lines
            _deliver(report, calibration, output)
    if waited >= TOO_MUCH_WAITING:
        remark(
            f"warning: a thread waited for a core for {waited:.0%} of a call's time: these rates "
            "are lower than this machine's; end what else runs, and measure again"
        )


def _deliver(report: Output, calibration: Calibration, output: Path | None) -> None:
    if output is not None:
        write_document(output, calibration.document())
    else:
        _keep(report, calibration)
    report.put(calibration.document())


def _keep(report: Output, calibration: Calibration) -> None:
    try:
        path, kept = with_kept(calibration)
        write_document(path, kept.document())
        with suppress(OSError):  # of a file system without modes
            path.chmod(path.stat().st_mode & 0o755)  # whatever the umask: else it is not read
        report.line(f"kept in {path}, for --gpu-memory and plan --simulate")
    except Lfm2kitError as error:
        remark(f"the rates are not kept: {error}; --output names another file")


def _show(report: Output, calibration: Calibration) -> None:
    sides = calibration.sides
    of_experts = {str(side.experts): side.product for side in sides}
    _show_curves(report, "ms for one expert, by rows", "experts", of_experts)
    of_blocks = {str(block.key): block.call for block in calibration.blocks}
    _show_curves(report, "ms for a block without experts, by rows", "block", of_blocks)
    of_exchanges = {_between(one.key): one.call for one in calibration.exchanges}
    if of_exchanges:
        said = "ms for an exchange, by the bytes that each rank sends to each other one"
        _show_curves(report, said, "exchange", of_exchanges)
    for side in sides:
        report.line(f"{side.experts}: {'; '.join(_facts(side))}")
    if calibration.copies is not None:
        report.line(f"rows are copied at {calibration.copies / 1e9:.3g} GB/s")


def _between(key: ExchangeKey) -> str:
    machines = "one machine" if key.machines == 1 else f"{key.machines} machines"
    return f"{key.ranks} ranks on {machines}"


def _show_curves(report: Output, title: str, heading: str, curves: Mapping[str, Curve]) -> None:
    """Print a row for each curve, and a column for each size at which one was measured."""
    sizes = sorted({size for curve in curves.values() for size in curve.sizes})
    report.line(title)
    show_table(
        [(name, *_milliseconds(curve, sizes)) for name, curve in curves.items()],
        Column(heading, overflow="fold"),
        *(Column(str(one), justify="right", no_wrap=True) for one in sizes),
        box=SIMPLE_HEAD,
        pad_edge=False,
    )


def _milliseconds(curve: Curve, sizes: list[int]) -> Iterator[str]:
    seconds = dict(zip(curve.sizes, curve.seconds, strict=True))
    return (f"{1e3 * seconds[one]:.3g}" if one in seconds else "-" for one in sizes)


def _facts(side: Side) -> Iterator[str]:
    yield f"{size(side.expert_bytes)} each in memory '{side.memory}'"
    if side.link is not None:
        sent, came = side.link.from_host / 1e9, side.link.to_host / 1e9
        yield f"{sent:.3g} GB/s from the host and {came:.3g} GB/s back"
        yield f"{1e3 * side.expert_bytes / side.link.from_host:.3g} ms to send one"
    if side.ceilings is not None:
        flops, read = side.ceilings.flops / 1e9, side.ceilings.bytes / 1e9
        yield f"at best {flops:.3g} GFLOP/s and {read:.3g} GB/s read"
    yield from (f"{name} {text}" for name, text in side.hardware.items())
