"""Padding rows on a real GPU: others keep their bits, few forms are captured, no expert is read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lfm2kit_cuda.constants import GROUPING, ROUTER
from lfm2kit_cuda.requirements import why_unavailable

from lfm2kit import specs
from lfm2kit.backend import Context
from lfm2kit.batch import Batch
from lfm2kit.building.plugins import installed_plugins
from lfm2kit.engine.engine import Engine
from lfm2kit.engine.requests import Request
from lfm2kit.engine.sizes import size_for
from lfm2kit.state import Room
from lfm2kit.testing.host_block import host_block
from lfm2kit.testing.random_weights import random_weights
from lfm2kit.weights import Weights
from tests.random_model import build_random

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable())),
]

PRECISIONS = ["fp32", "bf16", "fp16"]
VOCAB = 1024


@pytest.mark.parametrize("precision", PRECISIONS)
def test_padding_changes_no_bit_of_other_rows(precision: str) -> None:
    """Steps run, are captured and are replayed; contexts have several parts."""
    model, rng = build_random("cuda", precision=precision), np.random.default_rng(0)
    assert model.takes_padding
    for sequences in range(1, 18):
        pages = rng.permutation(5 * sequences).reshape(sequences, 5).tolist()
        starts = rng.integers(1, 300, sequences)
        prompts = [rng.integers(VOCAB, size=n) for n in starts]
        plain, padded = (model.new_state(Room(5 * sequences, 64)) for _ in range(2))
        for state in (plain, padded):
            model.logits(Batch.of_sequences(prompts, pages=pages), state)
        for turn in range(4):
            ids = rng.integers(VOCAB, size=(sequences, 1))
            step = Batch.of_sequences([*ids], starts=(starts + turn).tolist(), pages=pages)
            with model.running():
                logits = model.forward(step.on(model.home), plain.layers)
                want = np.array(model.home.to_host(logits))
            got = model.logits(step.padded(size_for(sequences)), padded)
            assert np.array_equal(got[:sequences], want), (sequences, turn)
            assert np.isfinite(got).all()


def test_sequences_that_join_and_leave_capture_few_forms() -> None:
    model, rng = build_random("cuda", precision="bf16"), np.random.default_rng(1)
    model._replays.close()
    with Engine(model, Room(16, 128)) as engine:
        for n in range(16):
            engine.add(Request(rng.integers(VOCAB, size=2), max_tokens=100 - n))
            for _ in range(3):
                engine.step()
        while engine.is_busy:
            engine.step()
        keys: list[Any] = [key.forms for key in model._replays._kept]
        forms = [form for _, (form, *_), _ in keys]
    assert sorted(form.sequences for form in forms if form.max_seqlen == 1) == [1, 2, 4, 8, 16]


@pytest.mark.parametrize("tokens", [1, 16, GROUPING.MOST_TOKENS])
def test_rows_of_zeros_have_no_expert(rng: np.random.Generator, tokens: int) -> None:
    import cupy
    from lfm2kit_cuda.blocks.grouping import chosen_and_grouped
    from lfm2kit_cuda.blocks.router import Choice
    from lfm2kit_cuda.products import Tiling

    gemm: Any = SimpleNamespace(tiling=lambda pairs, groups: Tiling(8, 8, False))
    bias = rng.standard_normal(32, np.float32)
    weights = Weights.of_arrays({"expert_bias": bias})
    choice = Choice(specs.Choice(32, 4, True, True, 1.0), weights, gemm)
    sums = cupy.asarray(rng.standard_normal((ROUTER.SPLITS, tokens, 32), np.float32))
    x = np.zeros((tokens, 2048), np.float32)
    x[::2, -1] = 1e-40
    local = cupy.arange(32, dtype=np.int32)
    (ids, _), groups = chosen_and_grouped(choice, cupy.asarray(x), sums, local, gemm)
    assert (cupy.asnumpy(ids)[1::2] == -1).all()
    assert np.array_equal(ids[::2].get(), choice.by_sums(sums)[0][::2].get())
    assert (cupy.asnumpy(groups.place).reshape(tokens, 4)[1::2] == -1).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_moe_of_rows_of_zeros_has_the_bits_of_its_router_and_experts(
    rng: np.random.Generator, precision: str
) -> None:
    backend: Any = installed_plugins().creator(Context(precision=precision))("cuda")
    router = specs.Router(128, 32, 4, True, True, 1.0)
    moe = specs.SparseMoe(router, specs.Experts(128, 64, 32, 4, tuple(range(32))))
    weights = random_weights(moe, rng)
    whole, *parts = (host_block(backend, s, weights) for s in (moe, moe.router, moe.experts))
    x = rng.standard_normal((16, 128), np.float32)
    x[11:] = 0
    want = parts[1](x, *parts[0](x))
    assert np.array_equal(whole(x).view(np.int32), want.view(np.int32))
    assert not want[11:].view(np.int32).any()  # +0
