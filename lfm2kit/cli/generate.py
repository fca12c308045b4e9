"""`lfm2kit generate`: the text that follows a prompt, as it comes, or answers to many prompts."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from lfm2kit.building.options import About, Options
from lfm2kit.cli.options import (
    IndependentOption,
    JsonOption,
    RanksOption,
    TransportOption,
    Without,
    flags,
    spread,
)
from lfm2kit.cli.preparing import check_same_file, shared_paths
from lfm2kit.cli.ranks import (
    agreed,
    check_independent,
    ending_all_ranks,
    joined_job,
    leave_to_ranks,
    refuse_options,
)
from lfm2kit.cli.restricting import GIVEN_HERE, Restrictions
from lfm2kit.generating.options import Generation
from lfm2kit.ranks.launchers import DEFAULT_TRANSPORT

FILE = About(
    "Answer every prompt in this file, together. Each line is a JSON object with a prompt, or the "
    'messages of a chat, and perhaps options, such as {"prompt": "It is", "max_tokens": 9}.',
    metavar="JSONL",
)
OUTPUT = About(
    "Where the answers to --file go, a line for each. Those that are there already are kept.",
    metavar="JSONL",
)


@partial(spread, refused=refuse_options)
def generate(
    generation: Annotated[Generation, Without(GIVEN_HERE)],
    restrictions: Restrictions,
    options: Annotated[Options, Without(("seed",))],
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT|-", help="A text; - reads stdin.")
    ] = None,
    file: Annotated[Path | None, flags("file", FILE, is_path=True)] = None,
    output: Annotated[Path | None, flags("output", OUTPUT, is_path=True)] = None,
    keep_going: Annotated[
        bool,
        typer.Option(
            "--keep-going", help="Write what is wrong with a line of --file as its answer."
        ),
    ] = False,
    ranks: RanksOption = None,
    transport: TransportOption = DEFAULT_TRANSPORT,
    independent: IndependentOption = False,
    json: JsonOption = None,
) -> None:
    """Show the text that a model writes after a prompt, or write the answers to a file of them."""
    # Here, because all commands import this module, and none but this needs all of that.
    from lfm2kit.cli.asking import question_of
    from lfm2kit.cli.preparing_text import Prepared, facts_of, follow_writer, prepare

    check_independent(ranks, independent)
    job = None if independent else joined_job(transport)
    with ending_all_ranks(job), np.errstate(all="ignore"):  # what is not finite ends the answer
        files = {"--file": file, "--output": output}

        def prepared_to_answer() -> Prepared:
            question = question_of(prompt, file, output, keep_going)
            if job is not None or (ranks or 1) > 1:
                check_same_file({**shared_paths(options, json), **files, **restrictions.paths()})
            whole, reads = restrictions.added_to(generation), restrictions.reads()
            return prepare(options, whole, json, reads, question, job, ranks)

        asked = {"the prompt": prompt, **files, "--keep-going": keep_going, "--json": json}
        prepared = agreed(job, prepared_to_answer, partial(facts_of, asked))
        leave_to_ranks(job, transport, ranks)
        prepared = prepared.settled()
        if prepared.answer is None:
            follow_writer(prepared)
        else:
            prepared.answer(prepared)
