"""Measures what `lfm2kit profile` is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from lfm2kit.backend import Ceilings
from lfm2kit.batch import Batch
from lfm2kit.building.loading import Setup, set_up
from lfm2kit.building.options import Options
from lfm2kit.building.results import Checked
from lfm2kit.checkpoint import Checkpoint
from lfm2kit.cli.console import remark, stage
from lfm2kit.cli.rewrite_options import check_state, option_of
from lfm2kit.errors import Lfm2kitError
from lfm2kit.measuring.bench import measured_ceilings, random_batch
from lfm2kit.profiling.figures import Part, Total, parts_of, totals
from lfm2kit.profiling.forwards import Profile, Prompt, profiled
from lfm2kit.profiling.loads import expert_loads
from lfm2kit.state import Room
from lfm2kit.verifying import REFERENCE
from lfm2kit.verifying.verification import Verification, verify_against

COMPARED = 4  # samples whose blocks are compared with the reference's


class Asked(NamedTuple):
    """The sizes of what is measured."""

    n: int
    seq_len: int
    decode: bool
    repetitions: int
    loads: bool = False  # whether tokens are counted by expert
    errors: bool = False

    @property
    def test(self) -> str:
        if self.decode:
            return f"a step of {self.n} sequences after {self.seq_len} tokens"
        return f"a forward of {self.n} samples of {self.seq_len} tokens"


class Found(NamedTuple):
    """What was measured."""

    setup: Setup
    asked: Asked
    profile: Profile
    ceilings: Ceilings | None
    parts: Sequence[Part]
    loads: Mapping[int, Sequence[int]]  # tokens by layer and expert, if they were counted
    errors: Verification | None

    @property
    def totals(self) -> list[Total]:
        return list(totals(self.parts, self.ceilings))

    @property
    def inside(self) -> float:
        """Return the seconds that blocks take, which overlap where memories work side by side."""
        return sum(part.seconds for part in self.parts)

    @property
    def samples(self) -> tuple[int, int]:
        """Return the shape of the samples whose blocks are compared with the reference's."""
        return min(self.asked.n, COMPARED), self.asked.seq_len


def measured(checkpoint: Checkpoint, options: Options, asked: Asked) -> Found:
    """Build the model and measure its forwards."""
    tokens = asked.n * asked.seq_len
    setup = set_up(checkpoint, options, tokens=tokens)
    if asked.decode:
        check_state("--decode", setup.rewrites)
    if asked.loads:
        _check_rows(setup)
    for note in setup.notes():
        remark(note)
    prompt = _prompt(checkpoint, asked)
    with np.errstate(all="ignore"):
        profile = _profile(setup, prompt, asked)
        loads = expert_loads(checkpoint, options, prompt) if asked.loads else {}
        errors = _errors(setup, prompt) if asked.errors else None
    parts = parts_of(setup, profile, prompt.batch)
    return Found(setup, asked, profile, measured_ceilings(setup), parts, loads, errors)


def _profile(setup: Setup, prompt: Prompt, asked: Asked) -> Profile:
    """Return the profile of a model that is built for it, and gone when this returns."""
    checked: list[Checked] = []
    model = setup.build(tokens=asked.n * asked.seq_len, checked=checked)
    return profiled(model, checked, prompt, asked.repetitions, partial(stage, unit="forwards"))


def _errors(setup: Setup, prompt: Prompt) -> Verification:
    """Compare each block with the reference's, on the first samples of what is measured."""
    batch = prompt.batch if prompt.before is None else prompt.before
    samples = np.array(batch.token_ids).reshape(batch.sequences, -1)[:COMPARED]
    return verify_against(setup, samples, REFERENCE)


def _check_rows(setup: Setup) -> None:
    """Raise `Lfm2kitError` for rewrites that leave out rows, whose experts cannot be counted."""
    for rewrite in setup.rewrites:
        if not rewrite.keeps_rows:
            raise Lfm2kitError(
                f"--html counts the tokens of all rows; leave out {option_of(rewrite.name)}"
            )


def _prompt(checkpoint: Checkpoint, asked: Asked) -> Prompt:
    size = checkpoint.spec.embed_tokens.vocab_size
    if not asked.decode:
        return Prompt(random_batch(asked.n, asked.seq_len, size, seed=0))
    n, seq_len = asked.n, asked.seq_len
    room = Room.of_sequences(n, seq_len + 1)
    pages = np.arange(room.pages, dtype=np.int32).reshape(n, -1)
    ids = np.random.default_rng(0).integers(0, size, (n, seq_len + 1), dtype=np.int32)
    before = Batch.of_sequences(list(ids[:, :-1]), pages=pages)
    step = Batch.of_sequences(list(ids[:, -1:]), starts=[seq_len] * n, pages=pages)
    return Prompt(step, before, room)
