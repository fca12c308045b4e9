"""`lfm2kit generate`: the text that follows a prompt, as it comes, or answers to many prompts."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from lfm2kit.building.options import About, Options
from lfm2kit.cli.console import remark
from lfm2kit.cli.generate_many import Many
from lfm2kit.cli.options import (
    IndependentOption,
    JsonOption,
    RanksOption,
    TransportOption,
    Without,
    flags,
    spread,
)
from lfm2kit.cli.paces import Pace
from lfm2kit.cli.preparing import check_same_file, shared_paths
from lfm2kit.cli.preparing_text import (
    Answering,
    Prepared,
    facts_of,
    fields_of,
    follow_writer,
    prepare,
    writer_of,
)
from lfm2kit.cli.ranks import (
    agreed,
    check_independent,
    ending_all_ranks,
    joined_job,
    leave_to_ranks,
    refuse_options,
)
from lfm2kit.cli.restricting import GIVEN_HERE, Restrictions
from lfm2kit.cli.speaking import Voice
from lfm2kit.cli.text_input import text_of
from lfm2kit.engine.requests import Request
from lfm2kit.engine.room import most_tokens, wanted_tokens
from lfm2kit.errors import Lfm2kitError
from lfm2kit.generating.options import Generation
from lfm2kit.ranks.launchers import DEFAULT_TRANSPORT

BETWEEN = "---"  # the line between several answers

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
    file: Annotated[Path | None, flags("file", FILE)] = None,
    output: Annotated[Path | None, flags("output", OUTPUT)] = None,
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
    check_independent(ranks, independent)
    job = None if independent else joined_job(transport)
    with ending_all_ranks(job), np.errstate(all="ignore"):  # what is not finite ends the answer
        files = {"--file": file, "--output": output}

        def prepared_to_answer() -> Prepared:
            question = _question(prompt, file, output, keep_going)
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


class One:
    """A prompt, which is asked alone."""

    def __init__(self, prompt: str) -> None:
        self._prompt = prompt

    def reads(self) -> dict[str, list[Path]]:
        """Return the files that are read: none."""
        return {}

    def ask(self, prepared: Prepared) -> Answering:
        """Return what answers the prompt, which may come from stdin."""
        if (option := prepared.generation.scores) is not None and prepared.report.target is None:
            raise Lfm2kitError(option, ": needs --json FILE, where they go")
        text = text_of(self._prompt)
        return partial(_answer, prepared.language.request(text, prepared.generation, prepared.seed))


def _question(
    prompt: str | None, file: Path | None, output: Path | None, keep_going: bool
) -> One | Many:
    """Return what is asked: one prompt, or a file of them; `Lfm2kitError` if it is not clear."""
    if prompt is not None and file is not None:
        raise Lfm2kitError("a prompt and --file: give only one of them")
    if file is not None and output is None:
        raise Lfm2kitError(f"--file {file}: needs --output JSONL, where the answers go")
    if file is not None and output is not None:
        return Many(file, output, keep_going=keep_going)
    if prompt is None:
        raise Lfm2kitError("there is no prompt: give one, - to read stdin, or --file JSONL")
    if output is not None or keep_going:
        option = "--keep-going" if output is None else f"--output {output}"
        raise Lfm2kitError(f"{option}: is of --file, which is not given")
    return One(prompt)


def _answer(request: Request, prepared: Prepared) -> None:
    """Answer one prompt, and show the text as it comes."""
    options, report = prepared.generation, prepared.report
    voice = Voice(report.target)
    context = options.context
    if context is None and wanted_tokens(request) is not None:
        context = most_tokens(request, prepared.language.context)
    with (
        writer_of(prepared, context, options.sequences or request.n) as writer,
        voice.ending_its_line(),
    ):
        pace = Pace()
        answers = writer.begin(request, options, split=voice.is_terminal)
        for place, answer in enumerate(answers):
            if place:
                voice.line(BETWEEN)
            while not answer.is_taken:
                parts = writer.advance(answer)
                pace.note(writer.tokens)
                voice.say(parts)
            voice.line()
            answer.check()
    remark(f"{pace.line()}, seed {prepared.seed}")
    report.fields |= fields_of(request, answers, prepared.language.tokenizer) | pace.fields()
    report.write()
