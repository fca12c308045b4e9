"""Samples run through a model in batches, with the same bits on one rank and on several."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lfm2kit import progress
from lfm2kit.building.loading import set_up
from lfm2kit.building.options import Options
from lfm2kit.building.plugins import installed_plugins
from lfm2kit.measuring.running import default_batch_size, run_samples
from lfm2kit.progress import Progress
from lfm2kit.rewrites.experts_over_ranks import experts_over_ranks
from lfm2kit.testing import ThreadTransport, run_ranks
from tests.building.test_capacity import TINY
from tests.core.small import build, small_spec


@pytest.fixture(autouse=True)
def own_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what a run allows its blocks from other tests."""
    monkeypatch.setattr(progress, "THIS_PROCESS", Progress())


def inputs_of(samples: int) -> Any:
    return np.random.default_rng(samples).integers(50, size=(samples, 6), dtype=np.int32)


@pytest.mark.parametrize(("ranks", "samples", "batch_size"), [(2, 5, 2), (3, 8, 8), (4, 2, 1)])
def test_several_ranks_give_the_bits_of_one_in_the_order_of_the_samples(
    ranks: int, samples: int, batch_size: int
) -> None:
    spec, inputs = small_spec(), inputs_of(samples)
    alone = run_samples(build(spec), inputs, default_batch_size(6)).logits

    def rank(transport: ThreadTransport) -> Any:
        model = build(spec, rewrites=[experts_over_ranks(transport.world, transport)])
        run: list[int] = []
        timed = run_samples(model, inputs, batch_size, transport=transport, done=run.append)
        return timed.logits, run

    (first, _), *others = results = run_ranks(ranks, rank)
    assert np.array_equal(first, alone)
    assert [logits for logits, _ in others] == [None] * (ranks - 1)
    assert sum(sum(run) for _, run in results) == samples
    assert len({len(run) for _, run in results}) == 1, "ranks made different numbers of forwards"


def test_a_rank_is_set_up_from_a_checkpoint_with_its_transport() -> None:
    inputs, plugins, plan = inputs_of(3), installed_plugins(), Options(backend="reference")
    alone = run_samples(set_up(TINY, plan, plugins=plugins).build(), inputs, 3).logits

    def rank(transport: ThreadTransport) -> Any:
        setup = set_up(TINY, plan, plugins=plugins, transport=transport)
        assert [rewrite.name for rewrite in setup.rewrites] == ["experts-over-ranks"]
        return run_samples(setup.build(), inputs, 3, transport=transport).logits

    assert np.array_equal(run_ranks(2, rank)[0], alone)
