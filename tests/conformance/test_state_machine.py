"""Sequences come, grow, fork, step back and go, in any order, before every backend.

Each result has the bits of one forward over its sequence alone, without a state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from lfm2kit.backend import Context, Promise
from lfm2kit.batch import Batch
from lfm2kit.building.plugins import installed_plugins
from lfm2kit.model import LFM2
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.testing import draws, random_weights
from lfm2kit.testing.programs import ROOM, Fed, Program, Run
from lfm2kit.testing.sessions import Pages
from lfm2kit.testing.tiny_model import build_tiny_model
from tests.conformance.installed import item_of
from tests.core.small import small_spec

VOCABULARY = 50
# All experts are taken: no two results differ by a choice that was within rounding.
SPEC = small_spec(
    layer_types=["conv", "full_attention"], num_hidden_layers=2, num_dense_layers=1,
    num_experts=3, vocab_size=VOCABULARY,
)  # fmt: skip
ROUNDING = 1e-4  # of logits of a backend that does not promise the same bits
PLUGINS = installed_plugins()
BACKENDS = [item_of(name, b) for name, b in PLUGINS.backends.items() if b.why_not is None]


@cache
def model_of(backend: str) -> LFM2:
    on_trial = PLUGINS.creator(Context())(backend)
    return build_tiny_model(SPEC, random_weights(SPEC, 0), ReferenceBackend(), on_trial)


class ModelSequences:
    """A model as the subject of a program."""

    def __init__(self, backend: str, seed: int) -> None:
        self.model = model_of(backend)
        self.state = self.model.new_state(ROOM)
        self.pages = Pages(ROOM, np.random.default_rng(seed))
        not_promised = PLUGINS.backend(backend).not_promised
        has_bits = Promise.CHUNK_INVARIANCE.why_not(not_promised) is None
        self.within = 0.0 if has_bits else ROUNDING

    def draw(self, rng: np.random.Generator, tokens: int) -> Any:
        return rng.integers(VOCABULARY, size=tokens)

    def feed(self, *chunks: tuple[int, Any]) -> list[Any]:
        extended = [self.pages.extend(name, len(ids)) for name, ids in chunks]
        batch = Batch.of_sequences(
            [ids for _, ids in chunks],
            starts=[start for start, _ in extended],
            pages=[table for _, table in extended],
        )
        return list(self.model.logits(batch, self.state).copy()[:, None])

    def judge(self, values: Any, fed: Sequence[Fed], what: str) -> None:
        rows = np.array([row for one in fed for row in one.rows], np.int32)
        whole = replace(Batch.of_sequences([values]), logits_rows=rows)
        want, got = self.model.logits(whole), np.concatenate([one.result for one in fed])
        np.testing.assert_allclose(got, want, rtol=0, atol=self.within, err_msg=what)


@pytest.mark.parametrize(
    "backend",
    [pytest.param(b, marks=[pytest.mark.gpu] if b in ("cuda", "hybrid") else []) for b in BACKENDS],
)
def test_sequences_have_the_bits_of_separate_ones(backend: str) -> None:
    run(backend, examples=16)


@pytest.mark.long
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_more_sequences_have_the_bits_of_separate_ones(backend: str) -> None:
    run(backend, examples=120)


def run(backend: str, examples: int) -> None:
    def judge(program: Program) -> None:
        Run(ModelSequences(backend, program.seed), program).judge()

    draws.search(draws.programs(), judge, examples)
