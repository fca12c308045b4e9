"""The options of `lfm2kit perplexity`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def perplexity(
    text: Annotated[Path, typer.Argument(metavar="FILE", help="A text in UTF-8.")],
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="MODEL", help="As lfm2kit run takes it.")
    ] = "tiny",
    backend: Annotated[
        str | None,
        typer.Option(
            "--backend",
            "-b",
            metavar="PLAN",
            envvar="LFM2KIT_BACKEND",
            help="Which backend builds what. \\[default: auto]",
        ),
    ] = None,
    precision: Annotated[
        str, typer.Option("--precision", metavar="NAME", help="A precision of the backends.")
    ] = "fp32",
    threads: Annotated[
        int | None, typer.Option("--threads", metavar="N", help="Number of CPU threads.")
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            "--window", metavar="N", help="Tokens that the model sees at once. \\[default: 512]"
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            "--stride",
            metavar="N",
            help="Tokens from one window to the next. \\[default: half a window]",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="PLAN",
            help="Compare with this plan, in fp32 unless it names a precision.",
        ),
    ] = None,
    against_model: Annotated[
        str | None,
        typer.Option("--against-model", metavar="MODEL", help="Compare with this model."),
    ] = None,
    json: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE|-", help="Write a record; - means stdout."),
    ] = None,
) -> None:
    """Show how well a model predicts a text, and what it loses against another plan or model."""
    from lfm2kit.building.options import Options  # here: help needs none of it
    from lfm2kit_perplexity.command import Request, measure, other_options

    options = Options(model=model, backend=backend, precision=precision, threads=threads)
    other = other_options(options, against, against_model)
    measure(Request(text, options, window, stride, other, json))
