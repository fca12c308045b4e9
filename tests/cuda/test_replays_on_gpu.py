"""Graphs on a real GPU: bounded, given back, and never replayed with what a batch has not."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from lfm2kit_cuda.requirements import why_unavailable

from lfm2kit.batch import Batch
from lfm2kit.building.loading import set_up
from lfm2kit.building.options import Options
from lfm2kit.formats import F32
from lfm2kit.model import LFM2
from lfm2kit.replays import MOST
from lfm2kit.weights import Weights
from tests.cuda.alone import ALONE
from tests.random_model import RANDOM, build_random

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable())),
]

SHAPES = 5000
MOST_GROWTH = 400 << 20  # bytes, of 64 graphs of the random model and what the driver keeps


def plain(model: LFM2, batch: Batch) -> Any:
    return model.home.to_host(model.forward(batch.on(model.home))).copy()


def used_bytes() -> int:
    import cupy

    free, total = cupy.cuda.runtime.memGetInfo()
    return int(total - free)


@ALONE
def test_5000_shapes_end_with_bounded_memory_and_right_results() -> None:
    model, rng = build_random("cuda"), np.random.default_rng(0)
    lengths = list(product(range(1, 72), range(1, 72)))
    order = rng.permutation(len(lengths))[:SHAPES]
    before = used_bytes()
    for i, pair in enumerate(order):
        batch = Batch.of_sequences([rng.integers(1024, size=n) for n in lengths[pair]])
        uncaptured, captured = (model.logits(batch) for _ in range(2))
        assert np.array_equal(captured, uncaptured)
        if i % 25 == 0:
            assert used_bytes() - before < MOST_GROWTH
    assert len(model._replays) == MOST
    model._replays.close()
    assert model._replays.nbytes == 0


@ALONE
def test_a_closed_replay_gives_its_memory_back() -> None:
    model = build_random("cuda")
    batch = Batch.of_sequences([np.arange(512)] * 64)
    for _ in range(2):
        model.logits(batch)
    held, used = model._replays.nbytes, used_bytes()
    assert held > 32 << 20
    model._replays.close()
    assert used - used_bytes() > 0.9 * held
    assert np.array_equal(model.logits(batch), plain(model, batch))


def test_a_refused_batch_leaves_no_graph_of_its_positions() -> None:
    model = build_random("cuda")
    for _ in range(3):
        with pytest.raises(ValueError, match="no state"):
            model.logits(Batch.of_sequences([[1, 2, 3], [4]], starts=[1, 0]))
        batch = Batch.of_sequences([[1, 2, 3], [4]])
        assert np.array_equal(model.logits(batch), plain(model, batch))


def test_a_graph_takes_each_batchs_own_logits_rows() -> None:
    model = build_random("cuda")
    batch = Batch.of_sequences([[1, 2, 3], [4, 5]])
    for rows in ([2, 4], [0, 1], [4, 2], [3, 3]):
        wanted = replace(batch, logits_rows=np.array(rows, np.int32))
        assert np.array_equal(model.logits(wanted), plain(model, wanted))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_spoilt_embedding_reaches_the_logits_of_its_samples_alone(precision: str) -> None:
    checkpoint = RANDOM
    made = set_up(checkpoint, Options(backend="cuda", precision=precision))
    name = "embed_tokens.weight"
    values = checkpoint.weights.float32(name).copy()
    values[7, 0] = np.nan
    tensor = replace(checkpoint.weights[name], format=F32, data=values)
    weights = Weights({**checkpoint.weights, name: tensor})
    spoilt = replace(made, checkpoint=replace(checkpoint, weights=weights)).build()
    for _ in range(2):
        logits = spoilt.logits(Batch.of_sequences([[1, 2, 3], [1, 7, 3]]))
        assert np.isnan(logits[1]).all()
        assert np.isfinite(np.delete(logits[0], 7)).all()  # embeddings are tied: 7's logit is NaN
