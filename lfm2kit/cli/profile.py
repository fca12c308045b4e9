"""`lfm2kit profile`: where the time of a forward goes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lfm2kit import bounds
from lfm2kit.building.options import About, Options
from lfm2kit.cli.options import OF_RANKS, JsonOption, Without, files_of, flags, open_model, spread
from lfm2kit.cli.ranks import refuse_copies
from lfm2kit.cli.report import Report
from lfm2kit.outputs.files import check_target
from lfm2kit.outputs.targets import check_apart


@spread
def profile(
    options: Annotated[Options, Without(OF_RANKS)],
    n: Annotated[int, flags("n", About("Samples in a forward.", least=1))] = 16,
    seq_len: Annotated[
        int, flags("seq_len", About("Tokens in a sample, or before the step.", least=1))
    ] = 16,
    decode: Annotated[
        bool, typer.Option("--decode", help="Measure a step: one more token of each sequence.")
    ] = False,
    repetitions: Annotated[
        int, flags("repetitions", About("Forwards with marks, and as many without.", least=1))
    ] = 20,
    trace: Annotated[
        Path | None,
        flags(
            "trace",
            About("Write a forward for Perfetto or chrome://tracing.", metavar="FILE"),
            is_path=True,
        ),
    ] = None,
    html: Annotated[
        Path | None,
        flags(
            "html",
            About("Write a page with pictures; tokens are counted by expert.", metavar="FILE"),
            is_path=True,
        ),
    ] = None,
    errors: Annotated[
        bool,
        typer.Option(
            "--errors", help="Also compare each block with the reference's, as lfm2kit verify does."
        ),
    ] = False,
    json: JsonOption = None,
) -> None:
    """Measure each block inside a forward, and say where its time goes."""
    from lfm2kit.cli import profile_outputs, profile_tables, profiling

    refuse_copies()
    bounds.check_tokens(n, seq_len)
    report = Report(json, "lfm2kit profile")
    checkpoint = open_model(options)
    outputs = {"--json": report.path, "--trace": trace, "--html": html}
    check_apart(outputs, files_of(checkpoint, options))
    for name, path in (("--trace", trace), ("--html", html)):
        if path is not None:
            check_target(name, path)
    asked = profiling.Asked(n, seq_len, decode, repetitions, html is not None, errors)
    found = profiling.measured(checkpoint, options, asked)
    profile_tables.show(report, found)
    profile_outputs.deliver(report, found, trace, html)
