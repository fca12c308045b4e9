"""Measures, shows and writes what `lfm2kit grade` is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Column

from lfm2kit.building.loading import Setup, set_up
from lfm2kit.building.options import Options
from lfm2kit.checkpoint import Checkpoint
from lfm2kit.cli.console import STDOUT, remark, show_table, stage
from lfm2kit.cli.report import Report
from lfm2kit.cli.scaling import alone, is_job_valid, scaled
from lfm2kit.grading.grading import Bought, Graded, OfRanks, Speed, check_precision, grade
from lfm2kit.grading.models import COUNTS, SEQ_LEN, why_not_validated
from lfm2kit.grading.report import markdown as in_markdown
from lfm2kit.grading.report import sentences, tables
from lfm2kit.measuring.scaling import Job
from lfm2kit.measuring.validate import Verdict, word
from lfm2kit.outputs.files import replaced
from lfm2kit.profiling.page.bars import bars
from lfm2kit.profiling.page.facts import facts_of
from lfm2kit.profiling.page.page import page
from lfm2kit.profiling.page.picture import Picture
from lfm2kit.records.machine import machine_of

JOBS = 3  # repetitions of a job, each of which reads the model anew


def measured(
    checkpoint: Checkpoint, options: Options, repetitions: int, ranks: int | None, transport: str
) -> tuple[Setup, Graded]:
    """Grade a plan, with a bar for each stage.

    Jobs come first: this process then takes no memory of a device that they need as well, and what
    they refuse is said before anything is measured.
    """
    check_precision(options)
    setup = set_up(checkpoint, alone(options), tokens=max(COUNTS) * SEQ_LEN)
    several = None if ranks is None else graded_ranks(setup, options, ranks, transport, repetitions)
    with np.errstate(all="ignore"):
        graded = grade(setup, repetitions, partial(stage, unit="calls"))
    if several is None:
        graded.not_measured.append("several ranks beside one: give --ranks 2")
    else:
        graded.of_ranks, bought = several
        graded.bought.append(bought)
    return setup, graded


def graded_ranks(
    setup: Setup, options: Options, ranks: int, transport: str, repetitions: int
) -> tuple[OfRanks, Bought]:
    """Measure jobs of one rank and of several in turn, at the most samples."""
    n, options = max(COUNTS), replace(options, plan=None, n_cpu_moe=0)  # which the plan contains
    jobs = [Job(str(setup.plan), size, n) for size in (1, ranks)]
    one, several = scaled(options, jobs, SEQ_LEN, min(repetitions, JOBS), transport)
    is_valid = None if several.is_finite else False
    if several.is_finite and why_not_validated(setup.checkpoint, n) is None:
        is_valid = is_job_valid(options, several.job, transport)
    speed = Speed(f"fp32, {ranks} ranks", n, n / several.median, several.seconds)
    bought = Bought(f"{ranks} ranks", "one rank", one.median / several.median)
    return OfRanks(ranks, speed, is_valid), bought


def deliver(
    report: Report, setup: Setup, graded: Graded, markdown: Path | None, html: Path | None
) -> None:
    """Show the report, and write it where it was asked for."""
    title, facts = f"lfm2kit grade: {setup.plan}", _facts(setup)
    _show(report, graded)
    _record(report, setup, graded)
    if markdown is not None:
        _write(markdown, in_markdown(title, facts, graded))
    if html is not None:
        facts |= {f"{i}.": said for i, said in enumerate(sentences(graded), 1)}
        _write(html, page(title, facts, list(_pictures(graded)), report.record()))
    report.write()


def _write(path: Path, text: str) -> None:
    with replaced(path, remark) as file:
        file.write(text.encode())


def _show(report: Report, graded: Graded) -> None:
    for title, columns, rows in tables(graded) if report.target != STDOUT else ():
        show_table(rows, *map(Column, columns), title=title, box=SIMPLE_HEAD)
    for line in sentences(graded):
        report.line(line)


def _facts(setup: Setup) -> dict[str, str]:
    return {
        "model": str(setup.checkpoint.path),
        "plan": str(setup.plan),
        **facts_of(setup.context),
    }


def _pictures(graded: Graded) -> Iterator[Picture]:
    about = {
        "Blocks": "Points, of 10 for each block; they grow linearly up to the threshold.",
        "The whole model": "Samples per second, token ids in and logits out.",
        "FP16 by kind of block": "How many times as fast FP16 is, inside whole forwards.",
        "What optimisations buy": "How many times as fast the model is with each of them.",
    }
    numbers = {
        "Blocks": [(f"{b.kind}, {b.values}", b.points) for b in graded.blocks],
        "The whole model": [
            (f"{one.name}, {one.samples}", one.samples_per_second) for one in graded.measured_speeds
        ],
        "FP16 by kind of block": [(one.kind, one.factor) for one in graded.kinds],
        "What optimisations buy": [(one.name, one.ratio) for one in graded.bought],
    }
    for title, columns, rows in tables(graded):
        yield bars(title, about[title], numbers[title], columns, rows)


def _record(report: Report, setup: Setup, graded: Graded) -> None:
    report.machine = machine_of(setup)
    for block in graded.blocks:
        report.figure(f"{block.kind}, {block.values}", "s", block.seconds, "lower")
    for one in graded.measured_speeds:
        report.figure(f"{one.name}, {one.samples} samples", "s", one.seconds, "lower")
    report.fields = {
        "model": str(setup.checkpoint.path),
        "backend": str(setup.plan),
        "blocks": [_without_seconds(one._asdict()) for one in graded.blocks],
        "speeds": [_without_seconds(one._asdict()) for one in graded.speeds],
        "best": graded.best.samples,
        "verdict": _verdict(graded.verdict),
        "fp16": None if graded.half is None else _without_seconds(graded.half._asdict()),
        "fp16_verdict": _verdict(graded.half_verdict),
        "fp16_factor": graded.factor,
        "fp16_kinds": [one._asdict() for one in graded.kinds],
        "analysis": graded.analysis,
        "of_ranks": _of_ranks(graded.of_ranks),
        "bought": [one._asdict() for one in graded.bought],
        "not_measured": graded.not_measured,
    }


def _of_ranks(found: OfRanks | None) -> dict[str, Any] | None:
    if found is None:
        return None
    speed = _without_seconds(found.speed._asdict())
    return {"ranks": found.ranks, "is_valid": found.is_valid, **speed}


def _without_seconds(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields but for the repetitions, which are figures."""
    return {name: value for name, value in fields.items() if name != "seconds"}


def _verdict(verdict: Verdict | str) -> str:
    """Return the word for a verdict, or why there is none."""
    return verdict if isinstance(verdict, str) else word(is_valid=verdict.is_valid)
