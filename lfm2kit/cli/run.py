"""`lfm2kit run`: samples in, logits out, validated and timed.  The graded command."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from lfm2kit import progress as steps
from lfm2kit.building.options import About
from lfm2kit.cli.options import IndependentOption, flags, spread
from lfm2kit.cli.performing import perform
from lfm2kit.cli.preparing import Request, facts_of, prepare, settled
from lfm2kit.cli.ranks import (
    agreed,
    check_independent,
    ending_all_ranks,
    joined_job,
    leave_to_ranks,
    refuse_options,
)
from lfm2kit.errors import WRONG_RESULT


@partial(spread, refused=refuse_options)
def run(
    request: Request,
    independent: IndependentOption = False,
    deadline: Annotated[
        int,
        flags(
            "deadline",
            About("How long a rank may go without progress.", least=1, metavar="SECONDS"),
        ),
    ] = int(steps.DEADLINE),
) -> None:
    """Run samples through a model, time it, and validate its outputs."""
    steps.set_deadline(deadline)
    check_independent(request.ranks, independent)
    job = None if independent else joined_job(request.transport)
    with ending_all_ranks(job):
        # Without a job yet, what is wrong shows here: once, not on every rank.
        prepared = agreed(job, lambda: prepare(request, job), lambda p: facts_of(request, p))
        leave_to_ranks(job, request.transport, request.ranks)
        if not perform(request, settled(prepared, job), job):
            raise typer.Exit(WRONG_RESULT)
