"""The whole model: its speed at each number of samples, FP16 beside FP32, and what switches buy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lfm2kit.building.loading import Setup, set_up
from lfm2kit.building.results import Checked
from lfm2kit.checkpoint import Checkpoint
from lfm2kit.errors import Lfm2kitError
from lfm2kit.grading.apart import apart
from lfm2kit.measuring import samples
from lfm2kit.measuring.bench import Contender, forwards
from lfm2kit.measuring.running import default_batch_size, run_samples
from lfm2kit.measuring.validate import Verdict, validate
from lfm2kit.model import LFM2
from lfm2kit.specs import Layer

COUNTS = (16, 32, 64, 128)  # samples among which the assignment lets one choose
SEQ_LEN = 16
FP16, TWICE = "fp16", 2.0
SMALL = 50e6  # weights of a model that the reference computes in seconds
KINDS = ("conv", "attn", "mlp", "moe", "norm", "head")


class Built(NamedTuple):
    """A model that is ready to be timed."""

    name: str
    setup: Setup
    model: LFM2
    blocks: Sequence[Checked]  # of the model, by which it can be profiled

    def contender(self, n: int) -> Contender:
        (one,) = forwards(self.setup, self.model, [n], [SEQ_LEN], seed=n)
        return one


def built(name: str, setup: Setup) -> Built:
    tokens, blocks = max(COUNTS) * SEQ_LEN, list[Checked]()
    return Built(name, setup, setup.build(tokens=tokens, checked=blocks), blocks)


def validated(one: Built, n: int) -> Verdict | str:
    """Compare the logits of the model's own samples with its answers; a sentence if it has none."""
    checkpoint = one.setup.checkpoint
    if (why_not := why_not_validated(checkpoint, n)) is not None:
        return why_not
    inputs, answers = _own_samples(checkpoint)
    ids = samples.read_inputs(inputs)
    logits = run_samples(one.model, np.array(ids[:n]), default_batch_size(ids.shape[1])).logits
    assert logits is not None, "there are no other ranks"
    return validate(logits, samples.read_answers(answers), one.setup.grade)


def why_not_validated(checkpoint: Checkpoint, n: int) -> str | None:
    """Return None if a model has `n` samples and their answers beside it, else a sentence."""
    inputs, answers = _own_samples(checkpoint)
    if not (inputs.exists() and answers.exists()):
        return f"not validated: there is no {inputs.name} and {answers.name} beside the model"
    if (there := len(samples.read_inputs(inputs))) < n:
        return f"not validated: {inputs.name} has {there} samples"
    return None


def _own_samples(checkpoint: Checkpoint) -> tuple[Path, Path]:
    return checkpoint.beside("inputs.bin"), checkpoint.beside("answers.bin")


def in_precision(setup: Setup, precision: str) -> Setup | None:
    """Return the same set-up in another precision, if all backends of its plan have it."""
    options = replace(setup.options, precision=precision)
    try:
        return set_up(setup.checkpoint, options, tokens=max(COUNTS) * SEQ_LEN)
    except Lfm2kitError:
        return None


class Switch(NamedTuple):
    """An optimisation, and the model without it, or with it where it is not on by itself."""

    name: str
    how: str
    built: Built
    is_added: bool = False  # whether the model is without it otherwise


def switches(one: Built) -> Iterator[Switch]:
    """Yield what can be switched for a model, each built when it is asked for."""
    yield from switches_of_form(one)
    yield from _rewritten(one.setup)
    if one.setup.checkpoint.spec.weight_elements() <= SMALL:
        yield from _references(one.setup)


def switches_of_form(one: Built) -> Iterator[Switch]:
    """Yield what a backend does with a model beyond computing its blocks one by one."""
    setup = one.setup
    if one.model.is_captured:
        plain = one._replace(name="not captured", model=replace(one.model, may_capture=False))
        yield Switch(f"{one.name}: a graph of the whole forward", "without", plain)
    if any(isinstance(leaf.spec, Layer) for leaf in setup.placed.leaves()):
        parted = built("in parts", set_up(setup.checkpoint, setup.options, rewrites=[apart()]))
        yield Switch(f"{one.name}: layers built whole", "each part on its own", parted)


def _rewritten(setup: Setup) -> Iterator[Switch]:
    """Yield the model after each rewrite that is not applied already."""
    for name, rewrite in setup.plugins.rewrites().items():
        if rewrite.is_automatic or name in setup.options.rewrites:
            continue
        options = replace(setup.options, rewrites=(*setup.options.rewrites, name))
        other = built(name, set_up(setup.checkpoint, options))
        yield Switch(f"rewrite {name}", "without", other, is_added=True)


def _references(setup: Setup) -> Iterator[Switch]:
    """Yield the plan with one kind of block after the other from the reference."""
    for kind in KINDS:
        options = replace(setup.options, backend=f"{setup.plan},{kind}=reference:fp32")
        how = f"{kind}=reference"
        yield Switch(f"kernels for {kind}", how, built(how, set_up(setup.checkpoint, options)))
