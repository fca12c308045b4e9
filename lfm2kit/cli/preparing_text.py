"""Finds and checks what `lfm2kit generate` needs before a weight is read, and builds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from lfm2kit.building.loading import Setup, set_up
from lfm2kit.building.options import Options
from lfm2kit.checkpoint import Checkpoint
from lfm2kit.cli.console import Report, remark
from lfm2kit.cli.options import files_of, open_model
from lfm2kit.cli.paces import Readying
from lfm2kit.cli.performing import built
from lfm2kit.cli.rewrite_options import check_state
from lfm2kit.engine.engine import BUDGET
from lfm2kit.generating.answer import Answer
from lfm2kit.generating.language import Language
from lfm2kit.generating.options import Generation, drawn_seed
from lfm2kit.generating.writer import Writer


class Prepared(NamedTuple):
    """All that is known and checked before a weight is read."""

    report: Report
    generation: Generation
    seed: int  # of all that ask for none
    checkpoint: Checkpoint
    setup: Setup
    language: Language
    reads: dict[str, list[Path]]  # files that no output may replace


def prepare(
    options: Options, generation: Generation, report: Report, reads: dict[str, list[Path]]
) -> Prepared:
    """Find and check the model and its tokenizer; `reads` are files that are read as well."""
    checkpoint = open_model(options)
    reads = files_of(checkpoint, options) | reads
    report.check_apart(reads)
    language = Language(checkpoint.folder, checkpoint.spec)
    setup = set_up(checkpoint, options)
    check_state("generate", setup.rewrites)
    seed = drawn_seed() if generation.seed is None else generation.seed
    return Prepared(report, generation, seed, checkpoint, setup, language, reads)


def writer_of(prepared: Prepared, context: int | None, sequences: int | None) -> Writer:
    """Build the model, and say what it is and what there is room for."""
    setup, report = prepared.setup, prepared.report
    for note in (notes := list(setup.notes())):
        remark(note)
    readying = Readying()
    model = built(setup, BUDGET)
    writer = Writer(model, prepared.language, context=context, sequences=sequences)
    precision = setup.precision_of(setup.placed)
    readying.end()
    remark(f"{prepared.checkpoint.path} on {setup.plan}, {precision}; room for {writer.room}")
    remark(readying.line())
    report.fields |= {
        "model": str(prepared.checkpoint.path),
        "backend": str(setup.plan),
        "precision": precision,
        "seed": prepared.seed,
        "room": writer.room,
        "ready_seconds": readying.seconds,
        "notes": notes,
    }
    return writer


def fields_of(answer: Answer) -> dict[str, Any]:
    """Return what a record says of an answer."""
    return {"text": answer.text, "end": answer.end, "tokens": len(answer.token_ids)}
