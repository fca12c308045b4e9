"""`lfm2kit grade`: a plan by the scheme of the assignment from which lfm2kit grew."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lfm2kit.building.options import About, Options
from lfm2kit.cli.options import (
    JsonOption,
    TransportOption,
    Without,
    files_of,
    flags,
    open_model,
    spread,
)
from lfm2kit.cli.ranks import refuse_copies
from lfm2kit.cli.report import Report
from lfm2kit.cli.scaling import check_of_ranks
from lfm2kit.errors import WRONG_RESULT
from lfm2kit.outputs.files import check_target
from lfm2kit.outputs.targets import check_apart
from lfm2kit.ranks.launchers import DEFAULT_TRANSPORT


@spread
def grade(
    options: Annotated[Options, Without(("check", "seed"))],
    repetitions: Annotated[
        int, flags("repetitions", About("Timed calls of each measurement.", least=1))
    ] = 10,
    ranks: Annotated[
        int | None,
        flags("ranks", About("Also measure jobs of this many ranks, beside one of one.", least=2)),
    ] = None,
    transport: TransportOption = DEFAULT_TRANSPORT,
    markdown: Annotated[
        Path | None,
        flags("markdown", About("Write the report in Markdown.", metavar="FILE"), is_path=True),
    ] = None,
    html: Annotated[
        Path | None,
        flags("html", About("Write the report as a page.", metavar="FILE"), is_path=True),
    ] = None,
    json: JsonOption = None,
) -> None:
    """Measure blocks and model as the assignment grades them; exit with code 1 if any is wrong."""
    from lfm2kit.cli import grading

    refuse_copies()
    check_of_ranks(options, ranks)
    report = Report(json, "lfm2kit grade")
    checkpoint = open_model(options)
    outputs = {"--markdown": markdown, "--html": html}
    check_apart({"--json": report.path, **outputs}, files_of(checkpoint, options))
    for name, path in outputs.items():
        if path is not None:
            check_target(name, path)
    setup, graded = grading.measured(checkpoint, options, repetitions, ranks, transport)
    grading.deliver(report, setup, graded, markdown, html)
    if not graded.is_valid:
        raise typer.Exit(WRONG_RESULT)
