"""`lfm2kit perplexity`: reads a text, sets models up, scores it, and says what came of it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lfm2kit.building.loading import Setup, set_up
from lfm2kit.building.options import Options
from lfm2kit.chat.tokenizer import load_tokenizer
from lfm2kit.cli.console import progress, remark
from lfm2kit.cli.options import files_of, open_model
from lfm2kit.cli.ranks import refuse_copies
from lfm2kit.engine.room import context_of
from lfm2kit.errors import Lfm2kitError
from lfm2kit.records import Report
from lfm2kit.records.machine import machine_of
from lfm2kit_perplexity.figures import report_difference, report_model
from lfm2kit_perplexity.scoring import Scores, score, windows_at_once
from lfm2kit_perplexity.text import Text, tokenized
from lfm2kit_perplexity.windows import Window, check_sizes, windows

KIND = "lfm2kit perplexity"
WINDOW = 512  # tokens, as in llama.cpp's llama-perplexity


class Request(NamedTuple):
    """What is asked for."""

    text: Path
    options: Options
    window: int | None
    stride: int | None
    other: Options | None  # of the plan or the model to compare with
    json: str | None


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
    setups = [_set_up(options, report, request.text) for options in _all_options(request)]
    _check_same_vocabulary(setups)
    checkpoint = setups[0].checkpoint
    tokenizer = load_tokenizer(checkpoint.folder)
    tokenizer.check_fits(checkpoint.spec.embed_tokens.vocab_size)
    text = tokenized(request.text, tokenizer)
    size, stride = _sizes(request, min(context_of(one.checkpoint.spec) for one in setups))
    some = list(windows(len(text.ids), size, stride))
    start = time.perf_counter()
    scores = _scored(setups, text, some)
    seconds = time.perf_counter() - start
    _conclude(report, request, setups, text, (size, stride), scores, seconds)


def _all_options(request: Request) -> list[Options]:
    return [request.options, *([] if request.other is None else [request.other])]


def _set_up(options: Options, report: Report, text: Path) -> Setup:
    """Open a model and settle who builds what; nothing is built."""
    checkpoint = open_model(options)
    report.check_apart(files_of(checkpoint, options) | {"the text": [text]})
    return set_up(checkpoint, options)


def _check_same_vocabulary(setups: list[Setup]) -> None:
    sizes = [one.checkpoint.spec.embed_tokens.vocab_size for one in setups]
    if len(set(sizes)) > 1:
        one, other = (setup.checkpoint.path for setup in setups)
        raise Lfm2kitError(
            f"{one} has {sizes[0]} tokens, {other} {sizes[1]}: models of different vocabularies "
            "cannot be compared token by token"
        )


def _sizes(request: Request, context: int) -> tuple[int, int]:
    """Return the size of windows and how far apart they are."""
    size = min(WINDOW, context) if request.window is None else request.window
    stride = max(1, size // 2) if request.stride is None else request.stride
    check_sizes(size, stride, context)
    return size, stride


def _scored(setups: list[Setup], text: Text, some: list[Window]) -> Scores:
    """Build the models, and score the text in windows."""
    for sentence in dict.fromkeys(line for one in setups for line in one.remarks()):
        remark(sentence)
    models = [one.build() for one in setups]
    at_once = windows_at_once(some, models[0].spec.embed_tokens.vocab_size)
    scored = len(text.ids) - 1
    with progress("scoring", scored, "tokens") as advance, np.errstate(all="ignore"):
        return score(models, text.ids, some, at_once, advance)


def _conclude(
    report: Report,
    request: Request,
    setups: list[Setup],
    text: Text,
    sizes: tuple[int, int],
    scores: Scores,
    seconds: float,
) -> None:
    """Say what came of it, and write the record."""
    size, stride = sizes
    names = [f"{one.checkpoint.path.name}, {one.plan}, {_precision(one)}" for one in setups]
    report.line(" against ".join(names))
    report.line(f"{len(scores.logprobs)} tokens, in windows of {size} that are {stride} apart")
    report.fields = {
        "text": str(request.text),
        "text_bytes": text.bytes,
        "tokens": len(scores.logprobs),
        "window": size,
        "stride": stride,
        **_fields(setups[0]),
        "against": _fields(setups[1]) if len(setups) > 1 else None,
    }
    report.machine = machine_of(*setups)
    report_model(report, scores.logprobs, text.bytes)
    if len(setups) > 1:
        report_difference(report, scores)
    report.figure("time", "s", [seconds], "lower")
    report.write()


def _fields(setup: Setup) -> dict[str, str]:
    return {
        "model": str(setup.checkpoint.path),
        "backend": str(setup.plan),
        "precision": _precision(setup),
    }


def _precision(setup: Setup) -> str:
    return setup.precision_of(setup.placed)
