"""Prepares and measures what `lfm2kit profile` is asked for, on every rank of a job."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lfm2kit import progress
from lfm2kit.backend import Ceilings
from lfm2kit.batch import Batch
from lfm2kit.building.loading import Setup, set_up
from lfm2kit.building.options import Options
from lfm2kit.building.results import Checked
from lfm2kit.building.waits import Waits
from lfm2kit.checkpoint import check_no_part
from lfm2kit.cli.console import remark, stage
from lfm2kit.cli.options import files_of, open_model
from lfm2kit.cli.preparing import check_same_file, place_of, shared_paths
from lfm2kit.cli.ranks import check_size, facts_of_setup
from lfm2kit.cli.report import Report
from lfm2kit.cli.rewrite_options import check_state, option_of
from lfm2kit.cli.scaling import KIND
from lfm2kit.errors import Lfm2kitError
from lfm2kit.measuring.bench import measured_ceilings
from lfm2kit.outputs.files import check_target
from lfm2kit.outputs.targets import check_apart
from lfm2kit.profiling.figures import Part, Total, parts_of, totals
from lfm2kit.profiling.forwards import Job, Profile, Prompt, profiled, unseen
from lfm2kit.profiling.loads import Loads, expert_loads
from lfm2kit.profiling.ranks import OfRank, gathered, mean_ceilings, of_an_average_rank
from lfm2kit.profiling.scaling import Curve, curves_in
from lfm2kit.ranks.agreement import Fact, Facts
from lfm2kit.ranks.joining import Alone, settled_alike
from lfm2kit.state import Room
from lfm2kit.transport import Transport, share
from lfm2kit.verifying import REFERENCE
from lfm2kit.verifying.verification import Verification, verify_against

COMPARED = 4  # samples whose blocks are compared with the reference's


class Files(NamedTuple):
    """What is to be written, and a record that is to be shown."""

    trace: Path | None = None
    html: Path | None = None  # for which tokens are counted by expert
    scaling: Path | None = None
    json: str | None = None


class Asked(NamedTuple):
    """What is to be measured."""

    n: int
    seq_len: int
    decode: bool
    repetitions: int
    errors: bool
    files: Files = Files()

    def test(self, ranks: int) -> str:
        """Return what is measured, in words."""
        many = f" on {ranks} ranks" if ranks > 1 else ""
        if self.decode:
            return f"a step of {self.n} sequences after {self.seq_len} tokens{many}"
        return f"a forward of {self.n} samples of {self.seq_len} tokens{many}"


class Prepared(NamedTuple):
    """What is to be measured, with every block placed."""

    report: Report
    asked: Asked
    setup: Setup
    curves: Sequence[Curve] = ()  # of a record


class Found(NamedTuple):
    """What was measured."""

    setup: Setup
    asked: Asked
    profile: Profile
    ranks: Sequence[OfRank]
    loads: Loads  # if they were counted
    errors: Verification | None
    curves: Sequence[Curve] = ()

    @property
    def test(self) -> str:
        return self.asked.test(len(self.ranks))

    @property
    def parts(self) -> list[Part]:
        """Return the parts of an average rank."""
        return of_an_average_rank(self.ranks)

    @property
    def ceilings(self) -> Ceilings | None:
        return mean_ceilings(self.ranks)

    @property
    def totals(self) -> list[Total]:
        return list(totals(self.parts, self.ceilings))

    @property
    def samples(self) -> tuple[int, int]:
        """Return the shape of the samples whose blocks are compared with the reference's."""
        return min(self.asked.n, COMPARED), self.asked.seq_len


def prepared(options: Options, asked: Asked, job: Transport | None, ranks: int | None) -> Prepared:
    """Find and check everything before anything is measured."""
    check_size(job, ranks)
    world = place_of(job, ranks)
    if world.size > 1:
        _check_ranks(options, asked, world.size)
    files = asked.files
    report = Report(files.json if world.rank == 0 else None, "lfm2kit profile")
    checkpoint, curves = open_model(options), list[Curve]()
    if world.rank == 0:  # it alone reads and writes these, perhaps where others have no folder
        _check_outputs(report, files, files_of(checkpoint, options))
        curves = [] if files.scaling is None else curves_in(files.scaling, KIND)
    tokens = len(share(asked.n, world.size, world.size - 1)) * asked.seq_len
    setup = set_up(checkpoint, options, world=world, transport=job, tokens=tokens)
    if asked.decode:
        check_state("--decode", setup.rewrites)
    if files.html is not None:
        _check_rows(setup)
    return Prepared(report, asked, setup, curves)


def _check_outputs(report: Report, files: Files, reads: dict[str, list[Path]]) -> None:
    """Raise `Lfm2kitError` if a file cannot be written, or would replace one that is read."""
    outputs = {"--trace": files.trace, "--html": files.html}
    read = [] if files.scaling is None else [files.scaling]
    check_apart({"--json": report.path, **outputs}, {**reads, "the record": read})
    for name, path in outputs.items():
        if path is not None:
            check_target(name, path)
            check_no_part(name, path)


def _check_ranks(options: Options, asked: Asked, ranks: int) -> None:
    """Raise `Lfm2kitError` for what several ranks cannot measure."""
    files = asked.files
    named = {"--trace": files.trace, "--html": files.html, "--scaling": files.scaling}
    check_same_file({**shared_paths(options, files.json), **named})
    if asked.errors:
        raise Lfm2kitError(
            f"--errors compares the blocks of one process, not of {ranks} ranks; leave it out"
        )
    if asked.decode and asked.n < ranks:
        raise Lfm2kitError(
            f"-n {asked.n}: with --decode each of {ranks} ranks has a sequence; give -n {ranks} "
            "or more"
        )


def _check_rows(setup: Setup) -> None:
    """Raise `Lfm2kitError` for rewrites that leave out rows, whose experts cannot be counted."""
    for rewrite in setup.rewrites:
        if not rewrite.keeps_rows:
            raise Lfm2kitError(
                f"--html counts the tokens of all rows; leave out {option_of(rewrite.name)}"
            )


def facts_of(prepared: Prepared) -> Facts:
    """Return what all ranks must have in common before they read weights."""
    asked = prepared.asked
    sizes = {"-n": asked.n, "--seq-len": asked.seq_len, "--repetitions": asked.repetitions}
    given = {
        "--decode": asked.decode,
        "--errors": asked.errors,
        "--html": asked.files.html is not None,
    }
    return {
        **{name: Fact(str(value)) for name, value in sizes.items()},
        **{name: Fact("given" if is_given else "not given") for name, is_given in given.items()},
        **facts_of_setup(prepared.setup),
    }


def measured(prepared: Prepared, job: Transport | None) -> Found | None:
    """Build the model and measure its forwards, on every rank; None but on rank 0."""
    asked, setup = prepared.asked, prepared.setup
    setup = setup if job is None else settled_alike(job, setup)
    ranks = job or Alone()
    if ranks.world.rank == 0:
        for note in setup.notes():
            remark(note)
    prompt = _prompt(setup, asked)
    with np.errstate(all="ignore"):
        profile = _profile(setup, prompt, asked, Job(ranks, setup.among))
        loads = Loads() if asked.files.html is None else expert_loads(setup, prompt)
        errors = _errors(setup, prompt) if asked.errors else None
    ranks.barrier()  # so that all measure at the same time
    ceilings, parts = measured_ceilings(setup), parts_of(setup, profile, prompt.batch)
    told = gathered(ranks, profile, parts, prompt.batch.sequences, ceilings)
    if not told:
        return None
    return Found(setup, asked, profile, told, loads, errors, prepared.curves)


def _profile(setup: Setup, prompt: Prompt, asked: Asked, job: Job) -> Profile:
    """Return the profile of a model that is built for it, and gone when this returns."""
    checked, waits, world = list[Checked](), list[Waits](), job.ranks.world
    tokens = -(-asked.n // world.size) * asked.seq_len
    model = setup.build(tokens=tokens, checked=checked, waits=waits)
    largest = Batch.of_sequences([[0] * asked.seq_len] * -(-asked.n // world.size))
    progress.allow_forward(model.placed.leaves(), largest, world.size)
    shown = partial(stage, unit="forwards") if world.rank == 0 else unseen
    return profiled(model, [*checked, *waits], prompt, asked.repetitions, shown, job)


def _errors(setup: Setup, prompt: Prompt) -> Verification:
    """Compare each block with the reference's, on the first samples of what is measured."""
    batch = prompt.batch if prompt.before is None else prompt.before
    samples = np.array(batch.token_ids).reshape(batch.sequences, -1)[:COMPARED]
    return verify_against(setup, samples, REFERENCE)


def _prompt(setup: Setup, asked: Asked) -> Prompt:
    """Return this rank's share of the samples; a step goes on from all tokens but the last."""
    size, world = setup.checkpoint.spec.embed_tokens.vocab_size, setup.world
    tokens = asked.seq_len + asked.decode
    everyones = np.random.default_rng(0).integers(0, size, (asked.n, tokens), dtype=np.int32)
    mine = share(asked.n, world.size, world.rank)
    ids = everyones[mine.start : mine.stop]
    if not asked.decode:
        return Prompt(Batch.of_sequences(list(ids)))
    room = Room.of_sequences(len(ids), tokens)
    pages = np.arange(room.pages, dtype=np.int32).reshape(len(ids), -1)
    before = Batch.of_sequences(list(ids[:, :-1]), pages=pages)
    starts = [asked.seq_len] * len(ids)
    step = Batch.of_sequences(list(ids[:, -1:]), starts=starts, pages=pages)
    return Prompt(step, before, room)
