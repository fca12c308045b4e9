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
    refuse_copies()
    request = Request(options=options, n=n, inputs=inputs, random_inputs=random_inputs)
    if write_trace is not None:
        _write_trace(request, json, write_trace, against)
    elif against.endswith(ENDING):
        _compare_with_trace(request, json, Path(against))
    else:
        _compare(request, json, against)


def _write_trace(request: Request, json: str | None, file: Path, against: str) -> None:
    from lfm2kit.cli import verifying

    if against != REFERENCE:
        raise Lfm2kitError(f"--against {against}: with --write-trace nothing is compared")
    if file.suffix != ENDING:
        raise Lfm2kitError(f"--write-trace {file}: call it {file.name}{ENDING}, as NumPy does")
    check_target("--write-trace", file)
    report = Report(json, "lfm2kit verify --write-trace")
    checkpoint = open_model(request.options)
    outputs = {"--json": report.path, "--write-trace": file}
    check_apart(outputs, files_of(checkpoint, request.options))
    ids = token_ids_of(replace(request, n=request.n or SAMPLES), checkpoint)
    verifying.write(report, checkpoint, request.options, ids, file)


def _compare_with_trace(request: Request, json: str | None, trace: Path) -> None:
    from lfm2kit.cli import verifying

    given = {
        "-n": request.n,
        "--inputs": request.inputs,
        "--random-inputs": request.random_inputs,
    }
    for name, value in given.items():
        if value is not None:
            raise Lfm2kitError(f"{name} {value}: the trace {trace} has its own samples")
    report = Report(json, "lfm2kit verify")
    checkpoint = open_model(request.options)
    report.check_apart(files_of(checkpoint, request.options) | {"the trace": [trace]})
    verifying.against_trace(report, checkpoint, request, trace)


def _compare(request: Request, json: str | None, against: str) -> None:
    from lfm2kit.cli import verifying

    report = Report(json, "lfm2kit verify")
    checkpoint = open_model(request.options)
    report.check_apart(files_of(checkpoint, request.options))
    asked = replace(request, n=request.n or SAMPLES)
    verifying.against_backend(report, checkpoint, asked, token_ids_of(asked, checkpoint), against)
