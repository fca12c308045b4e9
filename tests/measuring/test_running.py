"""Samples run through a model in batches, with the same bits on one rank and on several."""

from __future__ import annotations

import threading
import tracemalloc
from typing import Any

import numpy as np
import pytest

from lfm2kit import progress
from lfm2kit.backend import Block, Spec
from lfm2kit.building.loading import set_up
from lfm2kit.building.options import Options
from lfm2kit.building.plugins import installed_plugins
from lfm2kit.measuring.gathering import (
    GatherInCommon,
    GatherOfMessages,
    gather_over,
    gathered_bytes,
)
from lfm2kit.measuring.running import default_batch_size, run_samples
from lfm2kit.progress import Progress
from lfm2kit.rewrites.experts_over_ranks import experts_over_ranks
from lfm2kit.testing import ThreadTransport, run_ranks
from lfm2kit.transport import World, share
from tests.core.small import build, small_spec
from tests.random_model import RANDOM


@pytest.fixture(autouse=True)
def own_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what a run allows its blocks from other tests."""
    monkeypatch.setattr(progress, "THIS_PROCESS", Progress())


def inputs_of(samples: int) -> Any:
    return np.random.default_rng(samples).integers(50, size=(samples, 6), dtype=np.int32)


class Sending(ThreadTransport):
    """A transport of ranks that have no memory in common."""

    shared = None  # type: ignore[assignment]


@pytest.mark.parametrize("make", [ThreadTransport, Sending])
@pytest.mark.parametrize(("ranks", "samples", "batch_size"), [(2, 5, 2), (3, 8, 8), (4, 2, 1)])
def test_several_ranks_give_the_bits_of_one_in_the_order_of_the_samples(
    ranks: int, samples: int, batch_size: int, make: Any
) -> None:
    spec, inputs = small_spec(), inputs_of(samples)
    alone = run_samples(build(spec), inputs, default_batch_size(6)).logits

    def rank(transport: ThreadTransport) -> Any:
        model = build(spec, rewrites=[experts_over_ranks(transport.world, transport)])
        run: list[int] = []
        timed = run_samples(model, inputs, batch_size, transport=transport, done=run.append)
        return timed.logits, run

    (first, _), *others = results = run_ranks(ranks, rank, make=make)
    assert np.array_equal(first, alone)
    assert [logits for logits, _ in others] == [None] * (ranks - 1)
    assert sum(sum(run) for _, run in results) == samples
    assert len({len(run) for _, run in results}) == 1, "ranks made different numbers of forwards"


class Busy(Sending):
    """A transport of ranks that cannot do two things at a time either."""

    def aside(self, purpose: str) -> Any:
        return None


def test_without_a_transport_that_works_aside_logits_are_gathered_too() -> None:
    spec, inputs = small_spec(), inputs_of(5)

    def rank(transport: ThreadTransport) -> Any:
        model = build(spec, rewrites=[experts_over_ranks(transport.world, transport)])
        return run_samples(model, inputs, 2, transport=transport).logits

    alone = run_samples(build(spec), inputs, 5).logits
    assert np.array_equal(run_ranks(2, rank, make=Busy)[0], alone)


def test_ranks_of_several_machines_send_their_logits() -> None:
    def rank(transport: ThreadTransport) -> Any:
        gather = gather_over(transport, 3, 4)
        mine = share(3, 2, transport.world.rank)
        everyones = gather.end(slice(None), np.full((len(mine), 4), mine.start, np.float32))
        return type(gather), gather.sent.bytes, None if everyones is None else everyones[:, 0]

    (kind, sent, logits), (_, others_sent, nothing) = run_ranks(2, rank, nodes=[0, 1])
    (in_common, *same), _ = run_ranks(2, rank)
    assert (kind, in_common) == (GatherOfMessages, GatherInCommon)
    assert (sent, others_sent, nothing) == (0, 2 * 4 * 4, None)
    assert logits.tolist() == [0, 1, 1]
    assert same[0] == 0
    assert same[1].tolist() == [0, 1, 1]


def test_logits_of_a_batch_travel_while_the_next_one_is_computed() -> None:
    """Those of the first batch arrive when the second one has been computed in part."""

    class Late(Sending):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.computed = threading.Event()

        def aside(self, purpose: str) -> Any:
            aside: Any = super().aside(purpose)
            gather = aside.gather

            def late(*arguments: Any) -> Any:
                assert purpose != "gather" or self.computed.wait(60), "nothing is computed"
                return gather(*arguments)

            aside.gather = late
            return aside

    def rank(transport: Any) -> Any:
        calls = iter([lambda: None, transport.computed.set])

        def wrap(name: str, spec: Spec, block: Block) -> Block:
            def called(*inputs: Any) -> Any:
                next(calls)()
                return block(*inputs)

            return called if name == "layers.3.operator" else block

        rewrites = [experts_over_ranks(transport.world, transport)]
        model = build(small_spec(), rewrites=rewrites, wrap=wrap)
        return run_samples(model, inputs_of(4), 1, transport=transport).logits

    alone = run_samples(build(small_spec()), inputs_of(4), 4).logits
    assert np.array_equal(run_ranks(2, rank, make=Late)[0], alone)


def test_a_rank_is_set_up_from_a_checkpoint_with_its_transport() -> None:
    inputs, plugins, plan = inputs_of(3), installed_plugins(), Options(backend="reference")
    alone = run_samples(set_up(RANDOM, plan, plugins=plugins).build(), inputs, 3).logits

    def rank(transport: ThreadTransport) -> Any:
        setup = set_up(RANDOM, plan, plugins=plugins, transport=transport)
        assert [rewrite.name for rewrite in setup.rewrites] == ["experts-over-ranks"]
        return run_samples(setup.build(), inputs, 3, transport=transport).logits

    assert np.array_equal(run_ranks(2, rank)[0], alone)


class OfFour:
    """Rank 0 of four, which gets zeros from the others."""

    world = World(0, 4)

    def gather(self, rows: Any, counts: Any) -> Any:
        return np.zeros((sum(counts), rows.shape[1]), np.float32)


@pytest.mark.parametrize(("batch", "times"), [(32, 1), (31, 2)])
def test_rank_0_gathers_in_the_memory_that_is_said(batch: int, times: int) -> None:
    """The logits of a single batch are those of all samples, and are not kept twice."""
    samples, vocab_size = 128, 4096
    mine = np.zeros((samples // 4, vocab_size), np.float32)
    tracemalloc.start()
    try:
        gather = GatherOfMessages(OfFour(), samples, vocab_size)  # type: ignore[arg-type]
        if batch < len(mine):
            gather.begin(slice(0, batch), mine[:batch])
        last = slice(batch, len(mine)) if batch < len(mine) else slice(0, batch)
        gather.end(last, mine[last])
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    said = gathered_bytes(samples, vocab_size)
    assert most == pytest.approx(said * times / 2, rel=0.05)
