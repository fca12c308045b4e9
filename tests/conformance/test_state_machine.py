"""Sequences come, grow, fork, step back and go, in any order, before every backend.

Each result has the bits of one forward over its sequence alone, without a state.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from lfm2kit.backend import Context
from lfm2kit.batch import Batch
from lfm2kit.building.plugins import installed_plugins
from lfm2kit.model import LFM2
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.state import STEP_BACK, Room
from lfm2kit.testing import random_weights
from lfm2kit.testing.sessions import Pages
from lfm2kit.testing.tiny_model import build_tiny_model
from tests.core.small import small_spec

VOCABULARY = 50
ROOM = Room(10, 64)
MOST_SEQUENCES, MOST_TOKENS = 4, 150
# All experts are taken: no two results differ by a choice that was within rounding.
SPEC = small_spec(
    layer_types=["conv", "full_attention"], num_hidden_layers=2, num_dense_layers=1,
    num_experts=3, vocab_size=VOCABULARY,
)  # fmt: skip
ROUNDS_BY_BATCH = {"blas"}  # its products round by how many rows there are, as its README says
PLUGINS = installed_plugins()
BACKENDS = [name for name, backend in PLUGINS.backends.items() if backend.why_not is None]


@cache
def model_of(backend: str) -> LFM2:
    on_trial = PLUGINS.creator(Context())(backend)
    return build_tiny_model(SPEC, random_weights(SPEC, 0), ReferenceBackend(), on_trial)


class Sequences(RuleBasedStateMachine):
    """A machine that does what users do with sequences, on the state of one model."""

    backend = "reference"

    @initialize(seed=st.integers(0, 2**32 - 1))
    def begin(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.model = model_of(self.backend)
        self.state = self.model.new_state(ROOM)
        self.pages = Pages(ROOM, self.rng)
        self.ids: dict[int, Any] = {}
        self.most: dict[int, int] = {}  # tokens that a sequence has had
        self.given: dict[int, dict[int, Any]] = {}  # logits by sequence and position
        self.next_name = 0

    @precondition(lambda self: len(self.ids) < MOST_SEQUENCES)
    @rule(tokens=st.sampled_from([1, 2, 5, 63, 64, 65]))
    def add(self, tokens: int) -> None:
        self._feed({self._new_name(): tokens})

    @precondition(lambda self: self.ids)
    @rule(data=st.data())
    def chunk(self, data: st.DataObject) -> None:
        """Feed some sequences chunks of any size, and perhaps a new one beside them."""
        lengths = {name: data.draw(st.sampled_from([0, 1, 2, 3, 16, 60])) for name in self.ids}
        if len(self.ids) < MOST_SEQUENCES:
            lengths[self._new_name()] = data.draw(st.sampled_from([0, 1, 7]))
        self._feed(lengths)

    @precondition(lambda self: self.ids)
    @rule(steps=st.integers(1, 4))
    def step(self, steps: int) -> None:
        """Decode: one token for each sequence."""
        for _ in range(steps):
            self._feed(dict.fromkeys(self.ids, 1))

    @precondition(lambda self: 0 < len(self.ids) < MOST_SEQUENCES)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        origin = data.draw(st.sampled_from(sorted(self.ids)))
        whole = self.pages.tokens[origin] // ROOM.page_tokens * ROOM.page_tokens
        if whole:
            name = self._new_name()
            self.ids[name] = self.ids[origin][: self.pages.fork(name, origin)]
            self._feed({name: 1})

    @precondition(lambda self: self.ids)
    @rule(data=st.data(), tokens=st.integers(1, STEP_BACK))
    def step_back(self, data: st.DataObject, tokens: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.ids)))
        start = self.pages.tokens[name] - tokens
        can_go_back = start >= max(1, self.most[name] - STEP_BACK)
        if can_go_back and self.pages.is_alone(name, start):
            self.judge(name)
            self.pages.step_back(name, tokens)
            self.ids[name] = self.ids[name][:start]
            self._feed({name: 1})

    @precondition(lambda self: self.ids)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.ids)))
        self.judge(name)
        self.pages.drop(name)
        del self.ids[name]

    def _new_name(self) -> int:
        self.next_name += 1
        return self.next_name

    def _feed(self, lengths: dict[int, int]) -> None:
        fed = {
            name: n
            for name, n in lengths.items()
            if n and self.pages.tokens.get(name, 0) + n <= MOST_TOKENS
        }
        if not fed:
            return
        order = [int(name) for name in self.rng.permutation(list(fed))]
        new = {name: self.rng.integers(VOCABULARY, size=fed[name]) for name in order}
        extended = [self.pages.extend(name, fed[name]) for name in order]
        batch = Batch.of_sequences(
            [new[name] for name in order],
            starts=[start for start, _ in extended],
            pages=[table for _, table in extended],
        )
        got = self.model.logits(batch, self.state)
        for name, logits in zip(order, got, strict=True):
            self.ids[name] = np.concatenate([self.ids.get(name, new[name][:0]), new[name]])
            self.most[name] = max(self.most.get(name, 0), len(self.ids[name]))
            self.given.setdefault(name, {})[len(self.ids[name]) - 1] = logits

    def judge(self, name: int) -> None:
        """Compare all logits that a sequence has given with those of one forward over it."""
        given = self.given.pop(name, None)
        if given:
            rows = np.array(list(given), np.int32)
            whole = replace(Batch.of_sequences([self.ids[name]]), logits_rows=rows)
            within = 1e-4 if self.backend in ROUNDS_BY_BATCH else 0
            want = self.model.logits(whole)
            np.testing.assert_allclose(list(given.values()), want, rtol=0, atol=within)

    def teardown(self) -> None:
        for name in getattr(self, "ids", ()):
            self.judge(name)


@pytest.mark.parametrize(
    "backend",
    [pytest.param(b, marks=[pytest.mark.gpu] if b in ("cuda", "hybrid") else []) for b in BACKENDS],
)
def test_sequences_have_the_bits_of_separate_ones(backend: str) -> None:
    run(backend, examples=8)


@pytest.mark.long
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_more_sequences_have_the_bits_of_separate_ones(backend: str) -> None:
    run(backend, examples=60)


def run(backend: str, examples: int) -> None:
    machine = type("Sequences", (Sequences,), {"backend": backend})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=12,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
