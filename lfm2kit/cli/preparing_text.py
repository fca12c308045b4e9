"""Finds and checks what `lfm2kit generate` needs before a weight is read, and builds it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from math import inf
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from lfm2kit.building.loading import Setup, set_up
from lfm2kit.building.options import Options
from lfm2kit.chat.tokenizer import Tokenizer
from lfm2kit.checkpoint import Checkpoint
from lfm2kit.cli.console import remark
from lfm2kit.cli.flags import flag
from lfm2kit.cli.options import files_of, open_model
from lfm2kit.cli.paces import Readying
from lfm2kit.cli.performing import built
from lfm2kit.cli.preparing import place_of
from lfm2kit.cli.ranks import check_size, facts_of_setup
from lfm2kit.cli.report import Report
from lfm2kit.cli.rewrite_options import check_state
from lfm2kit.engine.engine import BUDGET
from lfm2kit.engine.requests import Request
from lfm2kit.engine.scoring import Scored
from lfm2kit.engine.steps import THE_END, WAITING, follow, from_first
from lfm2kit.errors import Option
from lfm2kit.generating.answer import Answer
from lfm2kit.generating.language import Language
from lfm2kit.generating.options import Generation, drawn_seed
from lfm2kit.generating.writer import Writer
from lfm2kit.progress import step
from lfm2kit.promises import Promise
from lfm2kit.ranks.agreement import Fact, Facts
from lfm2kit.ranks.joining import settled_alike
from lfm2kit.records.machine import machine_of
from lfm2kit.transport import Transport


class Prepared(NamedTuple):
    """All that is known and checked before a weight is read."""

    report: Report
    generation: Generation
    seed: int  # of all that ask for none
    checkpoint: Checkpoint
    setup: Setup
    language: Language
    reads: dict[str, list[Path]]  # files that no output may replace
    job: Transport | None
    answer: Answering | None = None  # answers what is asked; None: another process does

    def settled(self) -> Prepared:
        """Return what every rank can do together; every rank of a job calls this."""
        if self.job is None:
            return self
        return self._replace(setup=settled_alike(self.job, self.setup))


Answering = Callable[[Prepared], None]
CHAT = "lfm2kit chat"  # which writes no record


class Question(Protocol):
    """What is asked of a model: one prompt, or many."""

    kind: str  # of the record of what comes of it

    def reads(self) -> dict[str, list[Path]]:
        """Return the files of prompts that are read, by what they are called."""
        ...

    def ask(self, prepared: Prepared) -> Answering:
        """Return what answers it, once it is read and found to be right."""
        ...


def prepare(
    options: Options,
    generation: Generation,
    json: str | None,
    reads: dict[str, list[Path]],
    question: Question | None = None,
    job: Transport | None = None,
    ranks: int | None = None,
) -> Prepared:
    """Find and check the model, its tokenizer and what is asked; `reads` are files of options.

    Of a job's ranks, the first alone asks and writes.  A process that is about to start them does
    not ask either: stdin is for them.
    """
    check_size(job, ranks)
    is_first = job is None or job.world.rank == 0
    kind = CHAT if question is None else question.kind
    report = Report(json if is_first else None, kind)
    checkpoint = open_model(options)
    of_question = {} if question is None else question.reads()
    reads = files_of(checkpoint, options) | reads | of_question
    report.check_apart(reads)
    language = Language(checkpoint.folder, checkpoint.spec)
    if is_first:
        language.check(generation)  # even where each line of a file has options of its own
    setup = set_up(checkpoint, options, world=place_of(job, ranks), transport=job)
    check_state("generate", setup.rewrites)
    seed = drawn_seed() if generation.seed is None else generation.seed
    prepared = Prepared(report, generation, seed, checkpoint, setup, language, reads, job)
    if question is None or not is_first or (job is None and (ranks or 1) > 1):
        return prepared
    step(*WAITING)  # stdin may be a user who types
    answer = question.ask(prepared)
    step("comparing what the ranks will do")
    return prepared._replace(answer=answer)


def facts_of(asked: Mapping[str, object], prepared: Prepared) -> Facts:
    """Return what the ranks of a job must have in common; `asked` by what users type.

    Only the first rank reads the prompts.
    """
    names = [one.name for one in fields(Generation)]
    own = {flag(Option(name)): getattr(prepared.generation, name) for name in names}
    facts = {name: Fact(str(value)) for name, value in {**asked, **own}.items()}
    return {**facts, **facts_of_setup(prepared.setup)}


def writer_of(prepared: Prepared, context: int | None, sequences: int | None) -> Writer:
    """Build the model, and say what it is and what there is room for.

    The other ranks of a job call `follow_writer` meanwhile.
    """
    setup, report, job = prepared.setup, prepared.report, prepared.job
    for note in (notes := [*setup.notes(), *_guesses_that_count(prepared)]):
        remark(note)
    readying = Readying()
    model = built(setup, BUDGET)
    if job is not None:
        from_first(job, np.array([context or 0, sequences or 0], np.int32))
    writer = Writer(model, prepared.language, context=context, sequences=sequences, job=job)
    precision = setup.precision_of(setup.placed)
    readying.end()
    among = "" if job is None else f", ranks: {job.world.size}"
    remark(
        f"{prepared.checkpoint.path} on {setup.plan}, {precision}{among}; room for {writer.room}"
    )
    remark(readying.line())
    report.fields |= {
        "model": str(prepared.checkpoint.path),
        "backend": str(setup.plan),
        "precision": precision,
        "ranks": setup.world.size,
        "seed": prepared.seed,
        "room": writer.room,
        "notes": notes,
    }
    report.machine = machine_of(setup)
    readying.report(report)
    return writer


def _guesses_that_count(prepared: Prepared) -> Iterator[str]:
    """Yield why guesses may change tokens, where a backend does not promise what they rely on."""
    if (speculate := prepared.generation.speculate) is None:
        return
    asked = flag(Option("speculate", speculate))
    for why in prepared.setup.why_not(Promise.CHUNK_INVARIANCE):
        yield f"{asked}: tokens may differ from those of plain decoding, because {why}"


def follow_writer(prepared: Prepared) -> None:
    """Build this rank's share of the model, and make the forwards of rank 0's writer."""
    assert prepared.job is not None, "a process alone has nobody to follow"
    model = built(prepared.setup, BUDGET, is_first=False)
    context, sequences = from_first(prepared.job, THE_END).tolist()
    follow(model, prepared.job, context=context or None, sequences=sequences or None)


def fields_of(request: Request, answers: Sequence[Answer], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what a record says of a prompt and its answers."""
    fields: dict[str, Any] = {
        "prompt_tokens": len(request.ids),
        "answers": [_fields_of_one(answer, tokenizer) for answer in answers],
    }
    if request.prompt_logprobs is not None:  # the first token has none
        scored = _logprobs(answers[0].prompt_logprobs, tokenizer)
        fields["prompt_logprobs"] = [None, *scored]
    return fields


def _fields_of_one(answer: Answer, tokenizer: Tokenizer) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "text": answer.text,
        "end": answer.end,
        "tokens": len(answer.token_ids),
    }
    if answer.logprobs:
        fields["logprobs"] = _logprobs(answer.logprobs, tokenizer)
    return fields


def _logprobs(scored: Iterable[Scored], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Return tokens, with their texts, and what is best at their places.

    JSON has no infinity: the logprob of what the model excludes is null.
    """

    def described(token_id: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.token_bytes(token_id).decode(errors="replace")
        return {"id": token_id, "text": text, "logprob": logprob if logprob > -inf else None}

    return [
        {**described(one.token_id, one.logprob), "best": [described(*pair) for pair in one.best]}
        for one in scored
    ]
