"""`lfm2kit generate --file`: answers to many prompts, made together, each written as it ends."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import typer

from lfm2kit.chat.tokenizer import Tokenizer
from lfm2kit.checkpoint import check_no_part
from lfm2kit.checkpoint.file_kinds import check_regular
from lfm2kit.cli.console import complain, progress, remark
from lfm2kit.cli.paces import Pace
from lfm2kit.cli.preparing_text import Answering, Prepared, fields_of, writer_of
from lfm2kit.errors import USER_ERROR, Lfm2kitError
from lfm2kit.generating.answer import Answer
from lfm2kit.generating.answer_file import ERROR, AnswerFile
from lfm2kit.generating.prompt_file import Asked, Broken, read_prompts
from lfm2kit.generating.writer import Writer, written
from lfm2kit.outputs.files import check_target
from lfm2kit.outputs.targets import check_apart


class Many:
    """A file of prompts, of which those are answered that have no answer in `output` yet."""

    kind = "lfm2kit generate --file"

    def __init__(self, prompts: Path, output: Path, *, keep_going: bool) -> None:
        self._prompts = prompts
        self._output = output
        self._keeps_going = keep_going

    def reads(self) -> dict[str, list[Path]]:
        """Return the files that are read."""
        return {"the prompts": [self._prompts]}

    def ask(self, prepared: Prepared) -> Answering:
        """Return what answers the prompts; `Lfm2kitError` for a line that cannot be answered."""
        _check_output(self._output)
        check_apart({"--output": self._output, "--json": prepared.report.path}, prepared.reads)
        # The path may be "." or "..", which says nothing of the model.
        name = os.path.basename(os.path.abspath(prepared.checkpoint.path))
        model = f"{name}, {prepared.setup.options.precision}"
        language, options = prepared.language, prepared.generation
        asked = read_prompts(self._prompts, language, options, prepared.seed, model)
        broken = [one for one in asked if isinstance(one, Broken)]
        if broken and not self._keeps_going:
            raise _stopped(self._prompts, broken[0].number, broken[0].why)
        return partial(self._answer, asked)

    def _answer(self, asked: Sequence[Asked | Broken], prepared: Prepared) -> None:
        """Answer what has no answer yet, and say how many could not be answered."""
        report, output = prepared.report, self._output
        answers = AnswerFile(output, asked, remark)
        broken = [one for one in asked if isinstance(one, Broken)]
        for one in broken:
            answers.add(one.number, {ERROR: one.why})
        left = [one for one in asked if isinstance(one, Asked) and one.number not in answers.kept]
        if answers.kept:
            remark(f"{output} has {len(answers.kept)} of {len(asked)} answers already")
        pace, failed = Pace(), len(broken)
        if left or prepared.job is not None:  # whose other ranks wait for a writer
            failed += self._answer_left(prepared, left, answers, pace)
        answers.put_in_order()
        report.fields |= {"prompts": len(asked), "kept": len(answers.kept), "failed": failed}
        pace.report(report)
        remark(f"{len(left)} prompts, {pace.line()}, seed {prepared.seed}")
        report.write()
        if failed:
            complain(
                f"{failed} of {len(asked)} prompts have no answer; {output} says why; to ask these "
                "again, correct their lines and repeat the command"
            )
            raise typer.Exit(USER_ERROR)  # of a job as well, of which no rank has failed

    def _answer_left(
        self, prepared: Prepared, left: Sequence[Asked], answers: AnswerFile, pace: Pace
    ) -> int:
        """Answer the lines that are left; return how many failed."""
        failed, options = 0, prepared.generation
        with (
            writer_of(prepared, options.context, options.sequences) as writer,
            progress("answering", len(left), "prompts") as advance,
        ):
            pace.start()
            begin = partial(_begin, writer)
            for asked, those in written(writer, left, begin, lambda: pace.note(writer.tokens)):
                advance(1)
                error = next((answer.error for answer in those if answer.error is not None), None)
                if error is None:
                    answers.add(asked.number, _fields(asked, those, prepared.language.tokenizer))
                    continue
                if not isinstance(error, Lfm2kitError):
                    raise error
                if not self._keeps_going:
                    raise _stopped(self._prompts, asked.number, str(error)) from None
                answers.add(asked.number, {ERROR: str(error)})
                failed += 1
        return failed


def _begin(writer: Writer, asked: Asked) -> list[Answer]:
    return writer.begin(asked.request, asked.options)


def _check_output(output: Path) -> None:
    check_target("--output", output)
    check_no_part("--output", output)
    if output.exists():
        check_regular(output)  # a later run reads it


def _fields(asked: Asked, answers: Sequence[Answer], tokenizer: Tokenizer) -> dict[str, Any]:
    seed = {"seed": asked.request.sampling.seed}
    return fields_of(asked.request, answers, tokenizer) | seed


def _stopped(prompts: Path, number: int, why: str) -> Lfm2kitError:
    return Lfm2kitError(
        f"{prompts}, line {number}: {why}; with --keep-going it is written as the answer, and the "
        "others are answered"
    )
