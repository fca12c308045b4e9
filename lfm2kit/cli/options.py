"""The options that several commands share, and what they mean."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from lfm2kit import bounds
from lfm2kit.backend import Context
from lfm2kit.checkpoint import Checkpoint, open_checkpoint
from lfm2kit.cli.bus_error import explain_bus_errors
from lfm2kit.errors import Lfm2kitError
from lfm2kit.loading import AUTO, find_model
from lfm2kit.plan import Plan
from lfm2kit.plugins import installed_plugins
from lfm2kit.transport import World

BACKEND_VARIABLE = "LFM2KIT_BACKEND"


def whole_number(
    *names: str,
    least: int = 1,
    most: int = bounds.COUNT,
    metavar: str = "N",
    help: str | None = None,
) -> Any:
    """Makes an option for whole numbers from `least` to `most`, with lfm2kit's own errors."""

    def parsed(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            expected = f"a whole number of {least} or more, as {names[0]} {least}"
            raise Lfm2kitError(f"{names[0]} {text}: expected {expected}")
        if number > most:
            raise Lfm2kitError(f"{names[0]} {text}: lfm2kit takes up to {most}")
        return number

    return typer.Option(*names, parser=parsed, metavar=metavar, help=help)


ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="Checkpoint folder, model.bin, or an embedded model.")
]
BackendOption = Annotated[
    str | None,
    typer.Option(
        "--backend",
        "-b",
        metavar="PLAN",
        envvar=BACKEND_VARIABLE,
        help="Which backend builds what: auto, cpu_simd, 'cpu_simd,2-4.moe=reference', "
        "'cpu_simd:bf16,head=cpu_simd:fp32'. "
        "\\[default: auto]",
    ),
]
PlanOption = Annotated[
    Path | None, typer.Option("--plan", metavar="FILE", help="The plan as a TOML file instead.")
]
PrecisionOption = Annotated[
    str, typer.Option(help="fp32, or a precision that the backends of the plan have.")
]
ThreadsOption = Annotated[
    int | None,
    whole_number("--threads", help="CPU threads. \\[default: the cores that this process may use]"),
]
CpuMoeOption = Annotated[
    int,
    whole_number(
        "--n-cpu-moe", "-ncmoe", least=0, help="Experts of the first N MoE layers on CPU."
    ),
]
TrimOption = Annotated[
    bool,
    typer.Option("--trim", help="Leave out rows that no logit depends on, in the last layers."),
]
JsonOption = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE|-", help="Also write the result as JSON; - is stdout."),
]


def open_model(name: str) -> Checkpoint:
    checkpoint = open_checkpoint(find_model(name), installed_plugins().readers.values())
    explain_bus_errors(checkpoint.path)
    return checkpoint


def chosen_plan(backend: str | None, plan_file: Path | None) -> Plan:
    """Returns the plan of `--backend` or `--plan`."""
    if plan_file is None:
        return Plan.parse(AUTO if backend is None else backend)
    if backend is not None:
        said = (
            f"{BACKEND_VARIABLE}=" if os.environ.get(BACKEND_VARIABLE) == backend else "--backend "
        )
        raise Lfm2kitError(f"{said}{backend} and --plan {plan_file}: give one of them")
    return Plan.read(plan_file)


def context_for(precision: str, threads: int | None, world: World) -> Context:
    return Context(
        precision=precision,
        threads=threads,
        local_ranks=world.local_size,
        local_rank=world.local_rank,
    )


def files_of(checkpoint: Checkpoint, plan_file: Path | None) -> dict[str, list[Path]]:
    """Returns the files that these options make a command read, which no output may replace."""
    return {
        "one of the model's": checkpoint.files(),
        "the plan": [] if plan_file is None else [plan_file],
    }
