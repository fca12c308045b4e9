"""Streamed experts on a real GPU: the bits of resident ones, plain and captured, however late."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from functools import reduce
from typing import Any

import numpy as np
import pytest
from lfm2kit_cuda.requirements import why_unavailable

from lfm2kit.backend import Batch, Context
from lfm2kit.building.loading import set_up
from lfm2kit.building.options import Options
from lfm2kit.building.plugins import installed_plugins
from lfm2kit.model import LFM2
from lfm2kit.rewrites import Places, StreamedExperts
from lfm2kit.testing.cases import experts
from lfm2kit.testing.random_inputs import random_inputs
from lfm2kit.testing.random_weights import random_weights
from tests.random_model import RANDOM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable())),
]

PRECISIONS = ["fp32", "bf16", "fp16"]
LAYERS, EXPERTS = range(2, 8), 16  # of the random model
SEQUENCES = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7], [9, 3], list(range(300))]
BATCH = Batch.of_sequences(SEQUENCES)
SLACK = 1 << 20


def backend_of(precision: str) -> Any:
    from lfm2kit.errors import Lfm2kitError

    try:
        return installed_plugins().creator(Context(precision=precision))("cuda")
    except Lfm2kitError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("slots", "each"), [(1, 1), (2, 1), (3, 2), (2, 5), (1, 9)])
def test_a_block_has_the_bits_of_resident_experts(slots: int, each: int, precision: str) -> None:
    """Of a block for each portion, whose results are added."""
    backend, rng = backend_of(precision), np.random.default_rng(slots)
    whole = experts(2048, 1792, 12, 4)
    weights = random_weights(whole)
    spec = StreamedExperts(replace(whole, local_experts=(3, 0, 8, 5, 11)), 0, slots, each)
    memory, streamed = backend.memory(spec), backend.build(spec, weights)
    parts = [backend.build(replace(whole, local_experts=ids), weights) for ids in spec.portions]
    for rows in (0, 1, 17, 300, 2048):
        inputs = [memory.from_host(a) for a in random_inputs(whole, rng, rows)]
        want = memory.to_host(reduce(memory.add, [part(*inputs) for part in parts]))
        for _ in range(3):
            assert memory.to_host(streamed(*inputs)).tobytes() == want.tobytes()


@pytest.fixture(scope="module")
def checkpoint() -> Any:
    return RANDOM


def model_of(
    checkpoint: Any, places: dict[int, Places], plan: str = "cuda", precision: str = "fp32"
) -> LFM2:
    options = Options(backend=plan, precision=precision, gpu_memory="free")
    return set_up(checkpoint, options).split(places).build()


def plain(model: LFM2, batch: Batch) -> Any:
    with model.running():
        return model.home.to_host(model.forward(batch.on(model.home))).copy()


STREAMED = {layer: Places(tuple(range(layer % 3, EXPERTS, 2))) for layer in LAYERS}
ALL_STREAMED = {layer: Places(tuple(range(EXPERTS))) for layer in LAYERS}
BOTH = {layer: Places(tuple(range(0, 10, 2)), (11, 1 + layer % 2 * 2, 15)) for layer in LAYERS}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("places", [STREAMED, ALL_STREAMED], ids=["some", "all"])
def test_a_model_with_streamed_experts_is_captured_and_its_replays_have_the_same_bits(
    checkpoint: Any, places: dict[int, Places], precision: str
) -> None:
    model = model_of(checkpoint, places, precision=precision)
    assert model._captures is not None
    expected = plain(model, BATCH)
    for _ in range(50):
        assert np.array_equal(model.logits(BATCH), expected)
        assert np.array_equal(plain(model, BATCH), expected)
    assert len(model._replays) >= 1
    if precision == "fp32":
        whole = set_up(checkpoint, Options(backend="cuda")).build().logits(BATCH)
        np.testing.assert_allclose(expected, whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("plan", ["cuda", "hybrid"])
def test_the_host_works_beside_and_the_logits_are_right(checkpoint: Any, plan: str) -> None:
    """Whether or not there is a crossing that lets the forward be captured."""
    model = model_of(checkpoint, BOTH, plan)
    whole = set_up(checkpoint, Options(backend="cuda")).build().logits(BATCH)
    first = model.logits(BATCH)
    np.testing.assert_allclose(first, whole, rtol=0, atol=1e-4)
    for _ in range(20):
        assert np.array_equal(model.logits(BATCH), first)


@pytest.mark.parametrize("places", [STREAMED, BOTH], ids=["streamed", "with a host"])
def test_alone_in_a_batch_and_permuted_a_sample_has_the_same_bits(
    checkpoint: Any, places: dict[int, Places]
) -> None:
    model = model_of(checkpoint, places)
    together = model.logits(BATCH)
    order = [3, 0, 4, 2, 1]
    permuted = model.logits(Batch.of_sequences([SEQUENCES[i] for i in order]))
    assert np.array_equal(permuted, together[order])
    for i, sequence in enumerate(SEQUENCES):
        for _ in range(2):
            alone = model.logits(Batch.of_sequences([sequence]))
            assert np.array_equal(alone[0], together[i])


@pytest.fixture
def late_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let copies begin late: the stream that copies is kept busy before each of them."""
    import cupy
    from lfm2kit_cuda.slots import _Passage

    fetch, size = _Passage.fetch, 4096
    busy = cupy.ones((size, size), cupy.float32), cupy.empty((size, size), cupy.float32)

    def late(passage: Any, number: int) -> None:
        if passage._held[number % len(passage._held)] != number:
            with passage._link.stream:
                for _ in range(number % 4):
                    cupy.multiply(busy[0], 1.0, out=busy[1])
        fetch(passage, number)

    cupy.multiply(busy[0], 1.0, out=busy[1])  # compiles
    cupy.cuda.Device().synchronize()
    monkeypatch.setattr(_Passage, "fetch", late)


def test_products_wait_for_late_copies(checkpoint: Any, late_copies: None) -> None:
    model = model_of(checkpoint, STREAMED)
    expected = plain(model_of(checkpoint, STREAMED), BATCH)
    for _ in range(5):
        assert np.array_equal(model.logits(BATCH), expected)


def test_copies_wait_for_late_products(checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy
    from lfm2kit_cuda.blocks.streamed import Portion

    expected = plain(model_of(checkpoint, STREAMED), BATCH)
    matrices, size = Portion.matrices, 4096
    busy = cupy.ones((size, size), cupy.float32), cupy.empty((size, size), cupy.float32)
    cupy.multiply(busy[0], 1.0, out=busy[1])  # compiles
    cupy.cuda.Device().synchronize()

    class Late:
        def __init__(self, portion: Any) -> None:
            self.inner = matrices(portion)

        def __enter__(self) -> Any:
            found = self.inner.__enter__()
            for _ in range(4):
                cupy.multiply(busy[0], 1.0, out=busy[1])
            return found

        def __exit__(self, *error: Any) -> Any:
            return self.inner.__exit__(*error)

    monkeypatch.setattr(Portion, "matrices", lambda portion: Late(portion))
    model = model_of(checkpoint, STREAMED)
    for _ in range(5):
        assert np.array_equal(model.logits(BATCH), expected)


def test_forwards_of_different_forms_share_the_slots(checkpoint: Any) -> None:
    model = model_of(checkpoint, STREAMED)
    batches = [Batch.of_sequences(SEQUENCES[i:]) for i in range(5)]
    expected = [plain(model, batch) for batch in batches]
    for turn in range(40):
        i = turn * 7 % 5
        assert np.array_equal(model.logits(batches[i]), expected[i])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_figures_are_what_is_taken(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy
    from lfm2kit_cuda.blocks import streamed as module

    pinned: list[int] = []
    empty_pinned = module.empty_pinned
    monkeypatch.setattr(module, "empty_pinned", lambda n: (pinned.append(n), empty_pinned(n))[1])
    backend, whole = backend_of(precision), experts(2048, 1792, 12, 4)
    weights, blocks = random_weights(whole), []
    pool = cupy.cuda.MemoryPool()
    kept = 0
    with cupy.cuda.using_allocator(pool.malloc):
        for position, ids in enumerate([(0, 3, 5, 7, 9), (1, 2, 4)]):
            spec = StreamedExperts(replace(whole, local_experts=ids), position, 2, 2)
            blocks.append(backend.build(spec, weights))
            kept += backend.kept_bytes(spec, weights)
            assert sum(pinned) == backend.pinned_bytes(spec, weights)
            pinned.clear()
    assert kept <= pool.used_bytes() <= kept + SLACK
    spec = StreamedExperts(replace(whole, local_experts=(0, 3, 5, 7, 9)), 0, 2, 2)
    inputs = [
        backend.memory(spec).from_host(a)
        for a in random_inputs(whole, np.random.default_rng(0), 2048)
    ]
    blocks[0](*inputs)
    pool = cupy.cuda.MemoryPool()
    with cupy.cuda.using_allocator(pool.malloc):
        result = blocks[0](*inputs)
    scratch = backend.scratch_bytes(spec, 2048)
    assert scratch <= pool.total_bytes() <= 1.5 * (scratch + result.nbytes) + SLACK
    assert pinned == []


def test_a_dropped_block_gives_its_pinned_memory_and_its_slots_back() -> None:
    """At once, and not when the garbage collector comes."""
    import cupy

    backend, whole = backend_of("fp32"), experts(2048, 1792, 12, 4)
    spec, weights = StreamedExperts(whole, 0, 2, 2), random_weights(whole)
    pool = cupy.cuda.MemoryPool()
    gc.disable()
    try:
        with cupy.cuda.using_allocator(pool.malloc):
            block = backend.build(spec, weights)
            assert pool.used_bytes() >= backend.kept_bytes(spec, weights)
            pinned = [weakref.ref(p) for p in block._block.slots._link.portions]
            del block
        assert pool.used_bytes() == 0
        assert all(one() is None for one in pinned)
    finally:
        gc.enable()


def test_a_size_is_kept(checkpoint: Any) -> None:
    """The random model in a part of its size: with experts on the host and streamed."""
    whole = set_up(checkpoint, Options(backend="cuda"))
    kept = whole.sizes.needed(whole.placed, whole.placed.memory.name).kept
    options = Options(backend="cuda", gpu_memory=f"{kept}B", streamed_experts=1)
    split = set_up(checkpoint, options)
    assert any(isinstance(leaf.spec, StreamedExperts) for leaf in split.placed.leaves())
    logits = split.build().logits(BATCH)
    np.testing.assert_allclose(logits, whole.build().logits(BATCH), rtol=0, atol=1e-4)
