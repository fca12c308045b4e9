"""`lfm2kit generate`: the text that follows a prompt, as it comes, or answers to many prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from lfm2kit.building.options import About, Options
from lfm2kit.cli.console import Report, remark
from lfm2kit.cli.generate_many import generate_many
from lfm2kit.cli.options import OF_RANKS, JsonOption, Without, flags, spread
from lfm2kit.cli.paces import Pace
from lfm2kit.cli.preparing_text import Prepared, fields_of, prepare, writer_of
from lfm2kit.cli.ranks import refuse_copies
from lfm2kit.cli.speaking import Voice
from lfm2kit.cli.text_input import text_of
from lfm2kit.errors import Lfm2kitError
from lfm2kit.generating.options import Generation

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


@spread
def generate(
    generation: Generation,
    options: Annotated[Options, Without((*OF_RANKS, "seed"))],
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
    json: JsonOption = None,
) -> None:
    """Show the text that a model writes after a prompt, or write the answers to a file of them."""
    refuse_copies()
    _check_together(prompt, file, output, keep_going)
    report = Report(json)
    with np.errstate(all="ignore"):  # what is not finite ends the answer
        if file is not None and output is not None:
            generate_many(file, output, options, generation, report, keep_going=keep_going)
        elif prompt is not None:
            text = text_of(prompt)
            _answer(prepare(options, generation, report, {}), text)


def _check_together(
    prompt: str | None, file: Path | None, output: Path | None, keep_going: bool
) -> None:
    """Raise `Lfm2kitError` unless there is one prompt, or a file of them and one for answers."""
    if prompt is None and file is None:
        raise Lfm2kitError("there is no prompt: give one, - to read stdin, or --file JSONL")
    if prompt is not None and file is not None:
        raise Lfm2kitError("a prompt and --file: give only one of them")
    if file is not None and output is None:
        raise Lfm2kitError(f"--file {file}: needs --output JSONL, where the answers go")
    if file is None and (output is not None or keep_going):
        option = "--keep-going" if output is None else f"--output {output}"
        raise Lfm2kitError(f"{option}: is of --file, which is not given")


def _answer(prepared: Prepared, text: str) -> None:
    """Answer one prompt, and show the text as it comes."""
    options, report = prepared.generation, prepared.report
    voice = Voice(report.target)
    request = prepared.language.request(text, options, prepared.seed)
    longest = None if request.max_tokens is None else len(request.ids) + request.max_tokens
    writer = writer_of(prepared, options.context or longest, options.sequences or request.n)
    pace = Pace()
    answers = writer.begin(request, options, split=voice.is_terminal)
    with voice.ending_its_line():
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
    report.fields |= {
        "prompt_tokens": len(request.ids),
        "answers": [fields_of(answer) for answer in answers],
        **pace.fields(),
    }
    report.write()
