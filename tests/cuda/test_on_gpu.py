"""The backend on a real GPU: conformance in every precision, and what a CUDA graph must keep."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from lfm2kit_cuda.requirements import why_unavailable

from lfm2kit.backend import Context, Room
from lfm2kit.batch import Batch
from lfm2kit.building.plugins import installed_plugins
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.testing import CHECKS
from lfm2kit.testing.cases import WIDE_MOE, WIDE_OPERATORS
from lfm2kit.testing.compare import assert_close
from lfm2kit.testing.host_block import host_block
from lfm2kit.testing.random_inputs import random_inputs
from lfm2kit.testing.random_weights import frozen_weights, random_weights
from lfm2kit.testing.runner import run_check
from lfm2kit.testing.verdicts import Skipped
from tests.conformance.test_oracle import CASES, expected, setup
from tests.cuda.alone import ALONE
from tests.random_model import build_random

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable())),
]

TOLERANCE = 1e-4  # of logits of std 3


def compute_capability() -> tuple[int, int]:
    from lfm2kit_cuda import device

    return device.compute_capability()


@cache
def backend(precision: str) -> Any:
    return installed_plugins().creator(Context(precision=precision))("cuda")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp32x3"])
@pytest.mark.parametrize("name", CHECKS)
def test_conformance(name: str, precision: str) -> None:
    if precision == "fp32x3" and compute_capability()[0] != 9:
        pytest.skip("fp32x3 takes a chip of compute capability 9.0")
    try:
        run_check(name, backend(precision), installed_plugins().precision("cuda", precision))
    except Skipped as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("case", CASES)
def test_logits_of_transformers(case: str) -> None:
    model = setup(case, "cuda").build()
    logits = model.logits(Batch.of_sequences(expected(case).ids()))
    assert np.abs(logits - expected(case).last_logits()).max() <= TOLERANCE


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_kernel_for_older_chips(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lfm2kit_cuda import device

    monkeypatch.setattr(device, "compute_capability", lambda: (8, 0))
    plugins = installed_plugins()
    older = plugins.creator(Context(precision=precision))("cuda")
    for name in (
        "mlp", "experts", "short-conv", "attention", "lm-head", "batch-independence", "zero-rows",
        "state-decode-batch", "state-chunked-equals-one-shot", "state-steps-back",
    ):  # fmt: skip
        run_check(name, older, plugins.precision("cuda", precision))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_saturated_experts_have_results_beyond_f16(precision: str) -> None:
    """Weights and inputs are positive, as in the assignment's block test: nothing cancels."""
    spec, rng = WIDE_MOE.experts, np.random.default_rng(4)
    weights = frozen_weights(
        {n: rng.random(shape, np.float32) for n, shape in spec.parameters().items()}
    )
    x, *routing = random_inputs(spec, rng, 33)
    inputs = 8 * rng.random(x.shape, np.float32), *routing
    want = host_block(ReferenceBackend(), spec, weights)(*inputs)
    got = host_block(backend(precision), spec, weights)(*inputs)
    assert want.min() > 4 * 65504  # of four experts, whose weights are at most 1
    grade = installed_plugins().precision("cuda", precision).grade
    assert_close(got, want, grade.block_error, precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("spec", WIDE_OPERATORS)
def test_a_state_takes_as_many_bytes_as_it_says(precision: str, spec: Any) -> None:
    block: Any = backend(precision).build(spec, random_weights(spec))
    room = Room(3, 192)
    nbytes = sum(array.nbytes for array in block.new_state(room) if not isinstance(array, int))
    assert nbytes == backend(precision).state_bytes(spec, room)


def test_hybrid_computes_here_and_routes_on_the_cpu() -> None:
    hybrid, cuda = build_random("hybrid"), build_random("cuda")
    batch = Batch.of_sequences(random_samples(np.random.default_rng(3), 16, 16, 5))
    assert hybrid.placed.copies() == 6  # a choice in each sparse layer
    assert np.abs(hybrid.logits(batch) - cuda.logits(batch)).max() <= TOLERANCE


@pytest.mark.parametrize("plan", ["hybrid", "cuda,choice=cpu_simd"])
def test_in_16_bits_whole_layers_take_a_choice_from_the_cpu(plan: str) -> None:
    apart, whole = (build_random(text, precision="bf16") for text in (plan, "cuda"))
    layer = dict(apart.placed.parts)["layers.2"]
    assert layer.backend == plan.partition(",")[0]
    assert [role for role, _ in layer.parts] == ["feed_forward.router.choice"]
    batch = Batch.of_sequences(random_samples(np.random.default_rng(3), 16, 16, 5))
    expected = whole.logits(batch).copy()
    assert np.abs(apart.logits(batch) - expected).max() <= TOLERANCE


@ALONE
def test_ceilings_are_those_of_a_gpu_and_of_the_precision() -> None:
    """Tensor cores do many times as much as FMA, which no forward in 16 bits may pass."""
    ceilings = {name: backend(name).ceilings() for name in ("fp32", "bf16", "fp16", "fp32x3")}
    print(ceilings)
    assert all(1e11 < one.bytes < 1e14 for one in ceilings.values())
    flops = {name: one.flops for name, one in ceilings.items()}
    assert 1e12 < flops["fp32"] < 2e14
    assert 4 < flops["bf16"] / flops["fp32"] < 64
    assert flops["fp16"] == pytest.approx(flops["bf16"], rel=0.2)
    assert flops["fp32x3"] == pytest.approx(flops["bf16"] / 3, rel=0.2)


def random_samples(rng: np.random.Generator, *lengths: int) -> list[Any]:
    return [rng.integers(1024, size=n, dtype=np.int32) for n in lengths]


def test_a_replayed_graph_gives_the_bits_of_the_plain_forward() -> None:
    model, rng = build_random("cuda"), np.random.default_rng(0)
    for _ in range(4):  # the second is captured, the others are replays
        batch = Batch.of_sequences(random_samples(rng, 16, 5, 1, 33))
        plain = model.home.to_host(model.forward(batch.on(model.home))).copy()
        assert np.array_equal(model.logits(batch), plain)


def test_graphs_of_several_shapes_do_not_share_memory() -> None:
    model, rng = build_random("cuda"), np.random.default_rng(1)
    batches = [Batch.of_sequences(random_samples(rng, *[16] * n)) for n in (1, 64, 2, 17)]
    first, *others = ([model.logits(batch) for batch in batches] for _ in range(3))
    for again in others:  # captured, then replayed
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_sample_has_the_same_bits_in_batches_that_take_other_tiles() -> None:
    model, rng = build_random("cuda"), np.random.default_rng(2)
    samples = random_samples(rng, *[16] * 128)
    alone = model.logits(Batch.of_sequences(samples[:1])).copy()
    for n in (2, 3, 16, 17, 128):
        assert np.array_equal(model.logits(Batch.of_sequences(samples[:n]))[:1], alone)


@pytest.mark.parametrize("is_kept", [False, True], ids=["whole", "with a state"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_more_sequences_than_a_grid_has_in_y(precision: str, is_kept: bool) -> None:
    model, ids = build_random("cuda", precision=precision), np.arange(70_000) % 1024
    alone = model.logits(Batch.of_sequences([[i] for i in range(1024)]))
    pages = np.arange(len(ids), dtype=np.int32)[:, None]
    batch = Batch.of_sequences(
        list(ids.astype(np.int32)[:, None]), pages=pages if is_kept else None
    )
    state = model.new_state(Room(len(ids), 64)) if is_kept else None
    assert np.array_equal(model.logits(batch, state), alone[ids])


@pytest.mark.parametrize("capability", [None, (8, 0)], ids=["this chip", "older chips"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_grids_in_layers_have_the_bits_of_flat_ones(
    precision: str, capability: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As large batches need them: with a limit of 3, small ones do."""
    from lfm2kit_cuda import device, launching

    if capability:
        monkeypatch.setattr(device, "compute_capability", lambda: capability)
    model, rng = build_random("cuda", precision=precision), np.random.default_rng(5)
    samples = random_samples(rng, *[70] * 8, *[3] * 3, 400)
    pages = np.full((12, 7), -1, np.int32)
    pages[:11, :2] = np.arange(22).reshape(11, 2)
    pages[11] = range(22, 29)
    first = Batch.of_sequences(samples, pages=pages)
    then = Batch.of_sequences(
        random_samples(rng, *[1] * 12), pages=pages, starts=[len(sample) for sample in samples]
    )

    def both_steps() -> list[Any]:
        state = model.new_state(Room(29, 64))
        return [model.logits(batch, state) for batch in (first, then)]

    flat = both_steps()
    monkeypatch.setattr(launching, "MOST_CTAS", 3)
    assert all(np.array_equal(a, b) for a, b in zip(both_steps(), flat, strict=True))
