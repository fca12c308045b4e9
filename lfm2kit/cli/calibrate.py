"""`lfm2kit calibrate`: how fast this machine computes experts and moves them, as a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from rich.box import SIMPLE_HEAD
from rich.table import Column

from lfm2kit.building.capacity import size
from lfm2kit.building.kept_rates import turn, with_kept
from lfm2kit.building.loading import set_up
from lfm2kit.building.options import About, Options
from lfm2kit.building.rates import Calibration, Side
from lfm2kit.checkpoint import check_no_part
from lfm2kit.cli.bench import TOO_MUCH_WAITING
from lfm2kit.cli.console import Report, progress, remark, show_table, write_document
from lfm2kit.cli.options import OF_RANKS, JsonOption, Without, files_of, flags, open_model, spread
from lfm2kit.errors import Lfm2kitError
from lfm2kit.measuring.calibration import ROWS, calibrated, measurable
from lfm2kit.outputs.files import check_target
from lfm2kit.outputs.targets import check_apart

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
)


@spread
def calibrate(
    options: Annotated[Options, Without(OF_A_PLACEMENT)],
    output: Annotated[
        Path | None,
        flags("output", About("Where to write the rates.", KEPT, metavar="FILE")),
    ] = None,
    json: JsonOption = None,
) -> None:
    """Measure how fast each side computes and gets experts, in less than a minute."""
    report = Report(json)
    if output is not None:
        check_target("--output", output)
        check_no_part("--output", output)
    checkpoint = open_model(options)
    check_apart({"--output": output, "--json": report.path}, files_of(checkpoint, options))
    setup = set_up(checkpoint, options)
    there = measurable(setup)
    for note in setup.notes():
        remark(note)
    with turn(remark):
        with progress("measuring", len(there) * (len(ROWS) + 1), "steps") as advance:
            calibration, waited = calibrated(setup, there, lambda: advance(1))
        report.fields = calibration.document()
        try:
            if json != "-":
                _show(report, calibration)
        finally:  # whatever becomes of the printed lines
            _deliver(report, calibration, output)
    if waited >= TOO_MUCH_WAITING:
        remark(
            f"warning: a thread waited for a core for {waited:.0%} of a call's time: these rates "
            "are lower than this machine's; end what else runs, and measure again"
        )


def _deliver(report: Report, calibration: Calibration, output: Path | None) -> None:
    if output is not None:
        write_document(output, report.fields)
    else:
        _keep(report, calibration)
    report.write()


def _keep(report: Report, calibration: Calibration) -> None:
    try:
        path, kept = with_kept(calibration)
        write_document(path, kept.document())
        with suppress(OSError):  # of a file system without modes
            path.chmod(path.stat().st_mode & 0o755)  # whatever the umask: else it is not read
        report.line(f"kept in {path}, for --gpu-memory")
    except Lfm2kitError as error:
        remark(f"the rates are not kept: {error}; --output names another file")


def _show(report: Report, calibration: Calibration) -> None:
    sides = calibration.sides
    rows = sorted({rows for side in sides for rows in side.product.rows})
    report.line("ms for one expert, by rows")
    show_table(
        [(str(side.experts), *_milliseconds(side, rows)) for side in sides],
        Column("experts", overflow="fold"),
        *(Column(str(count), justify="right", no_wrap=True) for count in rows),
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for side in sides:
        report.line(f"{side.experts}: {'; '.join(_facts(side))}")


def _milliseconds(side: Side, rows: list[int]) -> Iterator[str]:
    seconds = dict(zip(side.product.rows, side.product.seconds, strict=True))
    return (f"{1e3 * seconds[count]:.3g}" if count in seconds else "-" for count in rows)


def _facts(side: Side) -> Iterator[str]:
    yield f"{size(side.expert_bytes)} each in memory '{side.memory}'"
    if side.link is not None:
        sent, came = side.link.from_host / 1e9, side.link.to_host / 1e9
        yield f"{sent:.3g} GB/s from the host and {came:.3g} GB/s back"
        yield f"{1e3 * side.expert_bytes / side.link.from_host:.3g} ms to send one"
    if side.ceilings is not None:
        flops, read = side.ceilings.flops / 1e9, side.ceilings.bytes / 1e9
        yield f"at best {flops:.0f} GFLOP/s and {read:.3g} GB/s read"
    yield from (f"{name} {text}" for name, text in side.hardware.items())
