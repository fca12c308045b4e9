"""What `lfm2kit generate` is asked, one prompt or a file of them, and what answers one prompt."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from lfm2kit.cli.console import remark
from lfm2kit.cli.generate_many import Many
from lfm2kit.cli.paces import Pace
from lfm2kit.cli.preparing_text import Answering, Prepared, fields_of, writer_of
from lfm2kit.cli.speaking import Voice
from lfm2kit.cli.text_input import text_of
from lfm2kit.engine.requests import Request
from lfm2kit.engine.room import most_tokens, wanted_tokens
from lfm2kit.errors import Lfm2kitError

BETWEEN = "---"  # the line between several answers


class One:
    """A prompt, which is asked alone."""

    kind = "lfm2kit generate"

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


def question_of(
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
    report.fields |= fields_of(request, answers, prepared.language.tokenizer)
    pace.report(report)
    report.write()
