"""`lfm2kit profile`: where the time of a forward goes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from lfm2kit import bounds
from lfm2kit.building.options import About, Options
from lfm2kit.cli.options import (
    IndependentOption,
    JsonOption,
    RanksOption,
    TransportOption,
    flags,
    spread,
)
from lfm2kit.cli.ranks import (
    agreed,
    check_independent,
    ending_all_ranks,
    joined_job,
    leave_to_ranks,
    refuse_options,
)
from lfm2kit.ranks.launchers import DEFAULT_TRANSPORT


@partial(spread, refused=refuse_options)
def profile(
    options: Options,
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
    scaling: Annotated[
        Path | None,
        flags(
            "scaling",
            About("Show a record of lfm2kit bench --ranks as a curve.", metavar="FILE"),
            is_path=True,
        ),
    ] = None,
    ranks: RanksOption = None,
    transport: TransportOption = DEFAULT_TRANSPORT,
    independent: IndependentOption = False,
    json: JsonOption = None,
) -> None:
    """Measure each block inside a forward, and say where its time goes."""
    from lfm2kit.cli import profile_outputs, profile_tables, profiling

    check_independent(ranks, independent)
    job = None if independent else joined_job(transport)
    with ending_all_ranks(job):
        bounds.check_tokens(n, seq_len)
        files = profiling.Files(trace, html, scaling, json)
        asked = profiling.Asked(n, seq_len, decode, repetitions, errors, files)
        prepared = agreed(
            job, lambda: profiling.prepared(options, asked, job, ranks), profiling.facts_of
        )
        leave_to_ranks(job, transport, ranks)
        found = profiling.measured(prepared, job)
        if found is not None:
            profile_tables.show(prepared.report, found)
            profile_outputs.deliver(prepared.report, found)
