"""`lfm2kit verify`: which block differs first from another backend's, or from a stored trace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from lfm2kit.building.options import About, Options
from lfm2kit.cli.options import OF_RANKS, JsonOption, Without, files_of, flags, open_model, spread
from lfm2kit.cli.preparing import Request, token_ids_of
from lfm2kit.cli.ranks import refuse_copies
from lfm2kit.cli.report import Report
from lfm2kit.errors import Lfm2kitError
from lfm2kit.outputs.files import check_target
from lfm2kit.outputs.targets import check_apart
from lfm2kit.verifying import REFERENCE
from lfm2kit.verifying.traces import ENDING

SAMPLES = 4


@spread
def verify(
    options: Annotated[Options, Without((*OF_RANKS, "check"))],
    against: Annotated[
        str,
        flags(
            "against",
            About(
                "The backend to compare with, as a plan names it, such as cuda:fp32, or a trace.",
                REFERENCE,
                metavar=f"BACKEND|FILE{ENDING}",
            ),
        ),
    ] = REFERENCE,
    write_trace: Annotated[
        Path | None,
        flags(
            "write_trace",
            About("Write what each layer returns, and compare nothing.", metavar=f"FILE{ENDING}"),
            is_path=True,
        ),
    ] = None,
    n: Annotated[int | None, flags("n", About("Number of samples.", str(SAMPLES), least=1))] = None,
    inputs: Annotated[
        Path | None,
        flags(
            "inputs",
            About("File of token ids.", "inputs.bin beside the model", metavar="FILE"),
            is_path=True,
        ),
    ] = None,
    random_inputs: Annotated[
        int | None,
        flags(
            "random_inputs",
            About(
                "Take random samples of TOKENS ids instead of a file.", least=1, metavar="TOKENS"
            ),
        ),
    ] = None,
    json: JsonOption = None,
) -> None:
    """Compare every block with another backend's, and name the first one that differs."""
    from lfm2kit.cli import verifying

    refuse_copies()
    which = "" if write_trace is None else " --write-trace"
    report = Report(json, f"lfm2kit verify{which}")
    checkpoint = open_model(options)
    trace = Path(against) if against.endswith(ENDING) else None
    reads = files_of(checkpoint, options) | {"the trace": [] if trace is None else [trace]}
    check_apart({"--json": report.path, "--write-trace": write_trace}, reads)
    request = Request(options=options, n=n, inputs=inputs, random_inputs=random_inputs)
    if trace is not None:
        _check_alone(request, trace, write_trace)
        verifying.against_trace(report, checkpoint, options, trace)
        return
    ids = token_ids_of(replace(request, n=n or SAMPLES), checkpoint)
    if write_trace is None:
        verifying.against_backend(report, checkpoint, options, ids, against)
        return
    check_target("--write-trace", write_trace)
    verifying.write(report, checkpoint, options, ids, write_trace)


def _check_alone(request: Request, trace: Path, write_trace: Path | None) -> None:
    """Raise `Lfm2kitError` for samples beside a trace, which has its own, and for a second one."""
    given = {
        "-n": request.n,
        "--inputs": request.inputs,
        "--random-inputs": request.random_inputs,
        "--write-trace": write_trace,
    }
    for name, value in given.items():
        if value is not None:
            raise Lfm2kitError(f"{name} {value}: the trace {trace} has its own samples")
