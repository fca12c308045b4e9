"""`lfm2kit run`: samples in, logits out, validated and timed.  The graded command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lfm2kit import bounds
from lfm2kit import progress as steps
from lfm2kit.cli import options
from lfm2kit.cli.performing import perform
from lfm2kit.cli.preparing import Request, facts_of, prepare
from lfm2kit.cli.ranks import DEFAULT_TRANSPORT, agreed, ending_all_ranks, joined_job, launched
from lfm2kit.cli.rewrite_options import with_rewrites
from lfm2kit.errors import WRONG_RESULT


@with_rewrites
def run(
    model: options.ModelOption = "tiny",
    backend: options.BackendOption = None,
    plan: options.PlanOption = None,
    n: Annotated[
        int | None,
        options.whole_number("-n", help="Samples to run. \\[default: all, 128 at most]"),
    ] = None,
    validate_outputs: Annotated[
        bool, typer.Option("--validate", "-v", help="Compare the outputs with the answers.")
    ] = False,
    warmup: Annotated[
        bool, typer.Option("--warmup", "-w", help="Run one batch before the timed run.")
    ] = False,
    batch_size: Annotated[
        int | None,
        options.whole_number(
            "--batch-size", help="Samples in a forward. \\[default: 4096 tokens' worth]"
        ),
    ] = None,
    inputs: Annotated[
        Path | None, typer.Option(help="Token ids. \\[default: inputs.bin beside the model]")
    ] = None,
    random_inputs: Annotated[
        int | None,
        options.whole_number(
            "--random-inputs", metavar="TOKENS", help="Random samples of TOKENS ids, not a file."
        ),
    ] = None,
    seed: Annotated[
        int | None,
        options.whole_number(
            "--seed", least=0, most=bounds.SEED, help="Seed of the random ids. \\[default: 0]"
        ),
    ] = None,
    answers: Annotated[
        Path | None, typer.Option(help="Expected logits. \\[default: answers.bin beside the model]")
    ] = None,
    outputs: Annotated[
        Path | None, typer.Option(help="Where to write the logits. \\[default: nowhere]")
    ] = None,
    precision: options.PrecisionOption = "fp32",
    threads: options.ThreadsOption = None,
    n_cpu_moe: options.CpuMoeOption = 0,
    rewrites: tuple[str, ...] = (),
    ranks: Annotated[
        int | None,
        options.whole_number("--ranks", help="Processes that share samples and experts (MPI)."),
    ] = None,
    transport: Annotated[
        str, typer.Option(help="What several ranks talk over.")
    ] = DEFAULT_TRANSPORT,
    independent: Annotated[
        bool,
        typer.Option("--independent", help="Run alone, even if a launcher started several copies."),
    ] = False,
    deadline: Annotated[
        int,
        options.whole_number(
            "--deadline", metavar="SECONDS", help="How long a rank may go without progress."
        ),
    ] = int(steps.DEADLINE),
    json: options.JsonOption = None,
) -> None:
    """Runs samples through a model, and validates and times it."""
    request = Request(
        model=model,
        backend=backend,
        plan=plan,
        n=n,
        validate=validate_outputs,
        warmup=warmup,
        batch_size=batch_size,
        inputs=inputs,
        random_inputs=random_inputs,
        seed=seed,
        answers=answers,
        outputs=outputs,
        precision=precision,
        threads=threads,
        n_cpu_moe=n_cpu_moe,
        rewrites=rewrites,
        ranks=ranks,
        transport=transport,
        json=json,
    )
    steps.set_deadline(deadline)
    job = None if independent else joined_job(transport)
    with ending_all_ranks(job):
        # Without a job yet, what is wrong shows here: once, not on every rank.
        prepared = agreed(job, lambda: prepare(request, job), lambda p: facts_of(request, p))
        if job is None and (ranks or 1) > 1:
            raise typer.Exit(launched(transport, ranks or 1, sys.argv[1:]))
        if not perform(request, prepared, job):
            raise typer.Exit(WRONG_RESULT)
