"""`lfm2kit perplexity`: reads a text, sets models up, scores it, and says what came of it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lfm2kit.building.loading import Setup, set_up
from lfm2kit.building.options import Options
from lfm2kit.checkpoint import Checkpoint
from lfm2kit.cli.console import progress, remark
from lfm2kit.cli.options import files_of, open_model
from lfm2kit.cli.ranks import refuse_copies
from lfm2kit.records import Report
from lfm2kit.records.machine import machine_of
from lfm2kit_perplexity.figures import report_difference, report_model
from lfm2kit_perplexity.memory import check_memory
from lfm2kit_perplexity.scoring import Scores, logits_bytes, score
from lfm2kit_perplexity.work import Work, work_of

KIND = "lfm2kit perplexity"


class Request(NamedTuple):
    """What is asked for."""

    text: Path
    options: Options
    window: int | None
    stride: int | None
    other: Options | None  # of the plan or the model to compare with
    json: str | None


class Outcome(NamedTuple):
    """What was computed, and what came of it."""

    setups: list[Setup]
    work: Work
    scores: Scores
    seconds: float


def other_options(options: Options, plan: str | None, model: str | None) -> Options | None:
    """Return the options of what to compare with: another plan, in FP32, or another model."""
    if plan is None and model is None:
        return None
    other = options if plan is None else replace(options, backend=plan, precision="fp32")
    return other if model is None else replace(other, model=model)


def measure(request: Request) -> None:
    """Do what is asked; raise `Lfm2kitError` before any weight is read, if it cannot be done."""
    refuse_copies()
    report = Report(request.json, KIND)
    options = [request.options, *([] if request.other is None else [request.other])]
    checkpoints = [_opened(one, report, request.text) for one in options]
    work = work_of(request.text, checkpoints, request.window, request.stride)
    setups = [
        set_up(checkpoint, asked, tokens=work.most_tokens)
        for checkpoint, asked in zip(checkpoints, options, strict=True)
    ]
    start = time.perf_counter()
    scores = _scored(setups, work)
    outcome = Outcome(setups, work, scores, time.perf_counter() - start)
    _conclude(report, request.text, outcome)


def _opened(options: Options, report: Report, text: Path) -> Checkpoint:
    """Open a model, whose files, and the text, no record may replace."""
    checkpoint = open_model(options)
    report.check_apart(files_of(checkpoint, options) | {"the text": [text]})
    return checkpoint


def _scored(setups: list[Setup], work: Work) -> Scores:
    """Build the models, and score the text in windows."""
    for sentence in dict.fromkeys(line for one in setups for line in one.remarks()):
        remark(sentence)
    vocab_size = setups[0].checkpoint.spec.embed_tokens.vocab_size
    check_memory(setups, work.most_tokens, len(setups) * logits_bytes(work.most_rows, vocab_size))
    models = [one.build(tokens=work.most_tokens) for one in setups]
    ids = work.text.ids
    with progress("scoring", len(ids) - 1, "tokens") as advance, np.errstate(all="ignore"):
        return score(models, ids, work.windows, work.at_once, advance)


def _conclude(report: Report, path: Path, outcome: Outcome) -> None:
    """Say what came of it, and write the record."""
    setups, work, scores, seconds = outcome
    report.line(" against ".join(map(_name, setups)))
    scored = f"{len(scores.logprobs)} tokens, in windows of {work.size}"
    report.line(f"{scored} that are {work.stride} apart")
    report.fields = {"text": str(path), **_fields(outcome)}
    report.machine = machine_of(*setups)
    report_model(report, scores.logprobs, work.text.bytes)
    if len(setups) > 1:
        report_difference(report, scores)
    report.figure("time", "s", [seconds], "lower")
    report.write()


def _fields(outcome: Outcome) -> dict[str, Any]:
    one, *others = map(_fields_of_one, outcome.setups)
    return {
        "text_bytes": outcome.work.text.bytes,
        "tokens": len(outcome.scores.logprobs),
        "window": outcome.work.size,
        "stride": outcome.work.stride,
        **one,
        "against": others[0] if others else None,
    }


def _fields_of_one(setup: Setup) -> dict[str, str]:
    return {
        "model": str(setup.checkpoint.path),
        "backend": str(setup.plan),
        "precision": _precision(setup),
    }


def _name(setup: Setup) -> str:
    return f"{setup.checkpoint.path.name}, {setup.plan}, {_precision(setup)}"


def _precision(setup: Setup) -> str:
    return setup.precision_of(setup.placed)
