"""The load that is recorded is what the routers choose, in any memory, on any number of ranks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from lfm2kit import specs
from lfm2kit.backend import HOST, Batch, Block, Spec
from lfm2kit.building.load import Load
from lfm2kit.errors import Lfm2kitError
from lfm2kit.model import RoutedExperts
from lfm2kit.rewrites import recorded_load
from lfm2kit.rewrites.experts_over_ranks import experts_over_ranks
from lfm2kit.rewrites.recorded_load import LoadRecorder
from lfm2kit.rewrites.trim import TRIM
from lfm2kit.testing import ThreadTransport, run_ranks
from tests.conformance.late import LateBackend
from tests.core.small import build, small_spec
from tests.core.test_model import CapturingBackend, DeviceBackend, FusingBackend

SEQUENCES = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7]]
TOKENS = sum(map(len, SEQUENCES))
SPEC = small_spec()


def chosen(batch: Batch) -> list[Counter[int]]:
    """Return what each layer's router chooses, seen by a wrapper of the reference's."""
    layers: dict[str, Counter[int]] = {}

    def wrap(name: str, spec: Spec, block: Block) -> Block:
        def seen(x: Any) -> Any:
            ids, weights = block(x)
            layers.setdefault(name, Counter()).update(ids.ravel().tolist())
            return ids, weights

        return seen if isinstance(spec, specs.Router) else block

    build(SPEC, wrap=wrap).logits(batch)
    return list(layers.values())


def counts(load: Load | None) -> list[Counter[int]]:
    assert load is not None
    return [Counter({e: n for e, n in enumerate(one.counts) if n}) for one in load.layers]


BACKENDS = {
    "reference": lambda: None,
    "device": DeviceBackend,
    "late": LateBackend,
    "whole": lambda: FusingBackend(specs.SparseMoe, RoutedExperts),
    "capturing": CapturingBackend,
}


@pytest.mark.parametrize("name", BACKENDS)
def test_every_choice_is_counted_and_no_bit_changes(name: str) -> None:
    backend: Any = BACKENDS[name]()
    backends = {} if backend is None else {name: backend}
    recorder, batch = LoadRecorder(), Batch.of_sequences(SEQUENCES)
    model = build(SPEC, name, backends, rewrites=[recorder.rewrite()])
    for _ in range(2):
        logits = model.logits(batch)
    assert np.array_equal(logits, build(SPEC).logits(batch))
    twice = [Counter({e: 2 * n for e, n in one.items()}) for one in chosen(batch)]
    load = recorder.load("small", SPEC, None)
    assert counts(load) == twice
    assert load is not None
    assert (load.tokens, load.hidden_size) == (2 * TOKENS, 24)
    assert [(one.layer, one.num_experts_per_tok) for one in load.layers] == [(2, 3), (3, 3)]
    assert getattr(backend, "forms", []) == [], "a replay would count nothing"


def test_what_came_before_can_be_forgotten() -> None:
    recorder, batch = LoadRecorder(), Batch.of_sequences(SEQUENCES)
    model = build(SPEC, "late", {"late": LateBackend()}, rewrites=[recorder.rewrite()])
    model.logits(Batch.of_sequences([[7] * 40]))
    recorder.clear()
    model.logits(batch)
    assert counts(recorder.load("small", SPEC, None)) == chosen(batch)


def test_copies_of_ids_are_not_kept_without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded_load, "MOST_PENDING", 3)
    recorder, batch = LoadRecorder(), Batch.of_sequences([[1]])
    model = build(SPEC, "late", {"late": LateBackend()}, rewrites=[recorder.rewrite()])
    for _ in range(9):
        model.logits(batch)
        assert len(recorder._pending) < 3
    load = recorder.load("small", SPEC, None)
    assert load is not None
    assert load.tokens == 9


def of_rank(rank: int) -> Batch:
    return Batch.of_sequences(SEQUENCES[rank::3])


@pytest.mark.parametrize("is_last", [True, False])
def test_the_load_of_a_job_is_the_sum_over_its_ranks(is_last: bool) -> None:
    def rank(transport: ThreadTransport) -> Load | None:
        recorder = LoadRecorder()
        rewrites = [experts_over_ranks(transport.world, transport), recorder.rewrite()]
        model = build(SPEC, rewrites=rewrites if is_last else rewrites[::-1])
        model.logits(of_rank(transport.world.rank))
        return recorder.load("small", SPEC, transport)

    first, *others = run_ranks(3, rank)
    assert counts(first) == chosen(Batch.of_sequences(SEQUENCES))
    assert first is not None
    assert first.tokens == TOKENS
    assert others == [None, None]
    for layer, expected in enumerate(zip(*map(chosen, map(of_rank, range(3))), strict=True)):
        there = first.layers[layer].by_rank
        assert [Counter({e: n for e, n in enumerate(one) if n}) for one in there] == [*expected]


@pytest.mark.parametrize("is_last", [True, False])
def test_a_load_without_the_rows_that_are_trimmed_away_is_refused(is_last: bool) -> None:
    rewrites = [TRIM, LoadRecorder().rewrite()]
    with pytest.raises(Lfm2kitError) as refused:
        build(SPEC, rewrites=rewrites if is_last else rewrites[::-1])
    assert str(refused.value) == (
        "'record-load' needs all rows, and 'trim' leaves some out; give only one of them"
    )


def test_an_expert_that_is_nobodys_is_not_counted() -> None:
    recorder = LoadRecorder()
    (layer,) = (one for one in recorder.rewrite().apply(SPEC).layers[2:3])
    router = next(s for s in _all(layer) if isinstance(s, recorded_load.RecordedRouter))
    ids = np.array([[0, -1, 2], [-1, -1, -1], [2, 1, 4]], np.int32)
    join = recorder.rewrite().joins[type(router)](HOST)
    block = join.make(router, router=lambda x: (ids, ids))
    assert block(None)[0] is ids
    recorder._settle()
    assert recorder._counts[2].tolist() == [1, 1, 2, 0, 1, 2]


def _all(spec: Spec) -> list[Spec]:
    return [spec, *(inner for part in spec.parts() for inner in _all(part.spec))]


def test_a_model_without_experts_has_no_load() -> None:
    dense = small_spec(num_dense_layers=4)
    with pytest.raises(Lfm2kitError, match="no router"):
        LoadRecorder().rewrite().apply(dense)
