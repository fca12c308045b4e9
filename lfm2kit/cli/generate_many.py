"""`lfm2kit generate --file`: answers to many prompts, made together, each written as it ends."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lfm2kit.building.options import Options
from lfm2kit.checkpoint import check_no_part
from lfm2kit.checkpoint.file_kinds import check_regular
from lfm2kit.cli.console import Report, progress, remark
from lfm2kit.cli.paces import Pace
from lfm2kit.cli.preparing_text import Prepared, fields_of, prepare, writer_of
from lfm2kit.errors import Lfm2kitError
from lfm2kit.generating.answer import Answer
from lfm2kit.generating.answer_file import ERROR, AnswerFile
from lfm2kit.generating.options import Generation
from lfm2kit.generating.prompt_file import Asked, Broken, read_prompts
from lfm2kit.generating.writer import written
from lfm2kit.outputs.files import check_target
from lfm2kit.outputs.targets import check_apart


def generate_many(
    prompts: Path,
    output: Path,
    options: Options,
    generation: Generation,
    report: Report,
    *,
    keep_going: bool,
) -> None:
    """Answer the prompts that have no answer yet, and say how many could not be answered."""
    _check_output(output)
    prepared = prepare(options, generation, report, {"the prompts": [prompts]})
    check_apart({"--output": output, "--json": report.path}, prepared.reads)
    # The path may be "." or "..", which says nothing of the model.
    name = f"{os.path.basename(os.path.abspath(prepared.checkpoint.path))}, {options.precision}"
    asked = read_prompts(prompts, prepared.language, generation, prepared.seed, name)
    broken = [one for one in asked if isinstance(one, Broken)]
    if broken and not keep_going:
        raise _stopped(prompts, broken[0].number, broken[0].why)
    answers = AnswerFile(output, asked, remark)
    for one in broken:
        answers.add(one.number, {ERROR: one.why})
    left = [one for one in asked if isinstance(one, Asked) and one.number not in answers.kept]
    if answers.kept:
        remark(f"{output} has {len(answers.kept)} of {len(asked)} answers already")
    pace, failed = Pace(), len(broken)
    if left:
        failed += _answer(prompts, prepared, left, answers, pace, keep_going=keep_going)
    answers.put_in_order()
    report.fields |= {"prompts": len(asked), "kept": len(answers.kept), "failed": failed}
    report.fields |= pace.fields()
    remark(f"{len(left)} prompts, {pace.line()}, seed {prepared.seed}")
    report.write()
    if failed:
        raise Lfm2kitError(
            f"{failed} of {len(asked)} prompts have no answer; {output} says why; to ask these "
            "again, correct their lines and repeat the command"
        )


def _check_output(output: Path) -> None:
    check_target("--output", output)
    check_no_part("--output", output)
    if output.exists():
        check_regular(output)  # a later run reads it


def _answer(
    prompts: Path,
    prepared: Prepared,
    left: Sequence[Asked],
    answers: AnswerFile,
    pace: Pace,
    *,
    keep_going: bool,
) -> int:
    """Answer the lines that are left; return how many failed."""
    failed = 0
    writer = writer_of(prepared, prepared.generation.context, prepared.generation.sequences)

    def begin(asked: Asked) -> list[Answer]:
        return writer.begin(asked.request, asked.options)

    def stepped() -> None:
        pace.note(writer.tokens)

    pace.start()
    with progress("answering", len(left), "prompts") as advance:
        for asked, those in written(writer, left, begin, stepped):
            advance(1)
            error = next((answer.error for answer in those if answer.error is not None), None)
            if error is None:
                answers.add(asked.number, _fields(asked, those))
                continue
            if not isinstance(error, Lfm2kitError):
                raise error
            if not keep_going:
                raise _stopped(prompts, asked.number, str(error)) from None
            answers.add(asked.number, {ERROR: str(error)})
            failed += 1
    return failed


def _fields(asked: Asked, answers: Sequence[Answer]) -> dict[str, Any]:
    return {
        "answers": [fields_of(answer) for answer in answers],
        "prompt_tokens": len(asked.request.ids),
        "seed": asked.request.sampling.seed,
    }


def _stopped(prompts: Path, number: int, why: str) -> Lfm2kitError:
    return Lfm2kitError(
        f"{prompts}, line {number}: {why}; with --keep-going it is written as the answer, and the "
        "others are answered"
    )
