"""Any mixture of backends: the same logits, the same bits, and no more copies than `plan` shows."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from lfm2kit import specs
from lfm2kit.backend import Promise, Spec
from lfm2kit.batch import Batch
from lfm2kit.batch_rules import ARRAYS
from lfm2kit.building.builder import Builder, build_model
from lfm2kit.building.loading import Setup
from lfm2kit.building.placement import Placed, Placer
from lfm2kit.building.plan import Plan
from lfm2kit.building.plugins import Plugins, installed_plugins
from lfm2kit.model import JOINS, LFM2
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.rewrites import Places
from lfm2kit.rewrites.trim import KeptRows, TrimmedLayer
from lfm2kit.state import Room
from lfm2kit.testing import ThreadTransport, run_ranks
from lfm2kit.testing.near_ties import NEAR_TIE, GapWatch
from tests.conformance.mixtures import (
    SPEC,
    Mixture,
    checkpoint,
    crossed_mixtures,
    mixtures,
    plugins,
)

Floats = npt.NDArray[np.float32]

EXAMPLES = os.environ.get("LFM2KIT_MIXTURES")
NAMES = ("reference", "cpu_simd", "hybrid", "hybrid", "cuda", "device", "boxed", "blas", "auto")
FP32 = 1e-4  # how far logits may be from the reference's
GROWTH = 20  # how much larger than one block's an error in 16 bits may be after all layers


def drawn(few: int) -> Any:
    """Return settings for `few` examples, or as many as LFM2KIT_MIXTURES says."""
    return settings(
        max_examples=int(EXAMPLES or few),
        derandomize=EXAMPLES is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def reference(mixture: Mixture) -> tuple[Floats, Floats]:
    """Return the reference's logits, and how close each sequence's routers came to a tie."""
    watch = GapWatch(ReferenceBackend())
    placed = Placer(Plan("reference"), lambda name: watch, JOINS).place(SPEC)
    weights = checkpoint(mixture.seed).weights
    batch = Batch.of_sequences(mixture.sequences)
    logits = build_model(placed, Builder(weights, lambda name: watch), "reference").logits(batch)
    gaps = np.minimum.reduceat(np.min(watch.gaps, axis=0), batch.cu_seqlens[:-1])
    return logits, gaps


def judge(mixture: Mixture, setup: Setup, logits: Floats) -> None:
    """Compare with the reference's logits, but for sequences that a near tie has turned round."""
    expected, gaps = reference(mixture)
    is_fp32 = setup.grade.judged_by == "logits"
    block_error = max(setup.grade.block_error, setup.grade.rounding)
    within = FP32 if is_fp32 else GROWTH * block_error * np.abs(expected).max()
    is_off = ~(np.abs(logits - expected).max(axis=1) <= within)
    is_tie = gaps < (NEAR_TIE if is_fp32 else block_error)
    for gap in gaps[is_off & is_tie]:
        event(f"a near tie decided, at a gap of {gap:.1g}")
    off = np.flatnonzero(is_off & ~is_tie)
    assert not len(off), f"logits of sequences {off} are off by more than {within:.2g}"


# Copies.

PAIRS = (
    specs.RMSNorm, specs.Choice, specs.Router, specs.LastRows, specs.Layer, TrimmedLayer, KeptRows,
)  # fmt: skip
NOTHING_BUT_A_BATCH = (specs.Embedding, specs.Model)
HIDDEN_AND_DELTA = (specs.RMSNorm, specs.LastRows, specs.Layer, TrimmedLayer, KeptRows)


def arrays_in(placed: Placed) -> int:
    """Return how many arrays a block takes; a batch is copied once for all blocks."""
    if isinstance(placed.spec, NOTHING_BUT_A_BATCH):
        return 0
    if isinstance(placed.spec, HIDDEN_AND_DELTA):
        return 1 if placed.name in ("layers.0", "layers.0.operator_norm") else 2
    return 3 if placed.spec.kind.endswith("experts") else 1


def arrays_out(spec: Spec) -> int:
    return 2 if isinstance(spec, PAIRS) else 1


def shown(model: LFM2) -> dict[str, Counter[str]]:
    """Return the arrays that leave and enter each memory, as the placement says.

    A crossing's arrays are not copied by the host.  Of every other block that has its arrays from
    elsewhere `plan` says why it is not crossed.
    """
    copies = {memory: Counter[str]() for memory in counting(model)}
    nowhere = Counter[str]()
    for placed in model.placed.tree():
        is_awaited = placed.is_copied and placed.crosser is None
        assert is_awaited == bool(placed.why_not_crossed)
        if not is_awaited:
            continue
        there, back = arrays_in(placed), arrays_out(placed.spec)
        outer, inner = (copies.get(m.name, nowhere) for m in (placed.outer, placed.memory))
        outer["to host"] += there
        inner["from host"] += there
        inner["to host"] += back
        outer["from host"] += back
    return {memory: +counter for memory, counter in copies.items()}


def counting(model: LFM2) -> dict[str, Any]:
    memories = {placed.memory.name: placed.memory for placed in model.placed.tree()}
    return {name: m for name, m in memories.items() if hasattr(m, "copies")}


def counted(model: LFM2, batch: Batch) -> dict[str, Counter[str]]:
    """Return the arrays that one forward that is not a replay copies to and from each memory."""
    memories = counting(model)
    for memory in memories.values():
        memory.copies.clear()
    with model.running():
        logits = model.forward(batch.on(model.home))
        copies = {name: Counter(memory.copies) for name, memory in memories.items()}
        model.home.to_host(logits)
    return copies


def check_copies(model: LFM2, batch: Batch) -> None:
    """Check a new batch, whose own arrays are copied once as well, and the same one again."""
    fresh = Batch(**{name: getattr(batch, name) for name in ARRAYS}, max_seqlen=batch.max_seqlen)
    first, expected = counted(model, fresh), shown(model)
    assert counted(model, fresh) == expected
    for memory, copies in first.items():
        copies.subtract(expected[memory])
        assert copies["to host"] == 0
        assert 0 <= copies["from host"] <= len(ARRAYS) * len(fresh.family())


# The tests.


def check_alone(mixture: Mixture, model: LFM2, together: Floats) -> None:
    i = len(mixture.sequences) // 2
    alone = model.logits(Batch.of_sequences([mixture.sequences[i]]))
    np.testing.assert_array_equal(alone[0], together[i])


def check_steps(mixture: Mixture, model: LFM2, whole: Floats) -> None:
    """Check that prompts, and what follows them, have the bits of whole sequences."""
    longer = [(i, ids) for i, ids in enumerate(mixture.sequences) if len(ids) > 1]
    if not longer:
        return
    pages = [[i] for i, _ in longer]
    state = model.new_state(Room(len(mixture.sequences), 64))
    prompts = [ids[: len(ids) // 2] for _, ids in longer]
    model.logits(Batch.of_sequences(prompts, pages=pages), state)
    steps = [ids[len(ids) // 2 :] for _, ids in longer]
    starts = [len(prompt) for prompt in prompts]
    got = model.logits(Batch.of_sequences(steps, starts=starts, pages=pages), state)
    np.testing.assert_array_equal(got, whole[[i for i, _ in longer]])


@drawn(10)
@given(
    st.one_of(mixtures(NAMES, have_budgets=True), crossed_mixtures(have_budgets=True)),
    st.sampled_from([True, True, False]),
)
def test_any_mixture_has_the_references_logits(mixture: Mixture, has_gpu: bool) -> None:
    """The bits do not depend on where blocks are; a plan that cannot be built is one sentence."""
    where, twin = (plugins(are_devices_real=real, has_gpu=has_gpu) for real in (True, False))
    if (refusal := mixture.refusal(where)) is not None:
        check_refusal(refusal)
        assert mixture.gpu_memory or mixture.refusal(twin) == refusal
        return
    setup = mixture.set_up(where)
    model, batch = setup.build(), Batch.of_sequences(mixture.sequences)
    event(f"captured: {model._captures is not None}")
    whole = mixture.placed_as(setup)
    event(f"split by a budget: {whole is not mixture and len(whole.places) > 0}")
    logits = whole.set_up(twin).build().logits(batch)
    judge(mixture, setup, logits)
    for _ in range(3):  # plainly, captured, and replayed
        np.testing.assert_array_equal(model.logits(batch), logits)
    check_copies(model, batch)
    check_promises(mixture, setup, model, logits)


def check_promises(mixture: Mixture, setup: Setup, model: LFM2, logits: Floats) -> None:
    """Check the bits of other batches and of steps, unless a backend takes that promise back."""
    if [*setup.why_not(Promise.CHUNK_INVARIANCE)]:
        return
    check_alone(mixture, model, logits)
    if "trim" not in mixture.rewrites:
        check_steps(mixture, model, logits)


def check_refusal(refusal: str) -> None:
    assert refusal.strip()
    assert "\n" not in refusal
    event(re.sub("'.*?'|[0-9]", "_", refusal)[:60])


def check_two_ranks(where: Plugins, mixture: Mixture, whole: Mixture) -> None:
    """Check that the mixture has the bits of `whole`; the experts of a layer are on both ranks."""
    sequences = mixture.sequences
    expected = whole.set_up(where).build().logits(Batch.of_sequences(sequences))

    def rank(transport: ThreadTransport) -> list[Floats]:
        model = mixture.set_up(where, transport).build()
        share = Batch.of_sequences(sequences[transport.world.rank :: 2])
        return [model.logits(share).copy() for _ in range(3)]

    for i, shares in enumerate(run_ranks(2, rank)):
        for logits in shares:
            np.testing.assert_array_equal(logits, expected[i::2])


SIX = [ids[: 1 + i] for i, ids in enumerate(np.random.default_rng(4).integers(50, size=(6, 7)))]
IN_THREE_PLACES = {2: Places((0, 3), (4,)), 3: Places((1,), (2, 0)), 5: Places((), (1, 2, 4))}


@pytest.mark.parametrize("plan", ["hybrid", "hybrid,3.moe=cpu_simd,4-5.experts=cuda"])
def test_two_ranks_of_hybrid_have_the_bits_of_one(plan: str) -> None:
    """Each has a device of its own."""
    check_two_ranks(plugins(), Mixture(plan, SIX), Mixture(plan, SIX))


def test_two_ranks_of_split_experts_have_the_bits_of_one_with_whole_experts() -> None:
    """Products are added at their token's rank, in the order of k, wherever they were made.

    All experts are the reference's, on the device and on the host.
    """
    split = Mixture("hybrid,host_experts=reference", SIX, places=IN_THREE_PLACES)
    check_two_ranks(plugins(), split, Mixture("hybrid", SIX))


# On a real GPU.

GPU = installed_plugins().backends["cuda"].why_not
ON_GPU = ("reference", "cpu_simd", "hybrid", "hybrid", "cuda", "cuda", "cuda:bf16", "cuda:fp16")


@pytest.mark.gpu
@pytest.mark.skipif(GPU is not None, reason=str(GPU))
@drawn(60)
@given(st.one_of(mixtures(ON_GPU), crossed_mixtures()))
def test_any_mixture_on_a_gpu_has_the_references_logits(mixture: Mixture) -> None:
    where = installed_plugins()
    if (refusal := mixture.refusal(where)) is not None:
        check_refusal(refusal)
        return
    setup = mixture.set_up(where)
    model, batch = setup.build(), Batch.of_sequences(mixture.sequences)
    event(f"captured: {model._captures is not None}")
    logits = model.logits(batch).copy()
    judge(mixture, setup, logits)
    for _ in range(2):
        np.testing.assert_array_equal(model.logits(batch), logits)
    check_promises(mixture, setup, model, logits)


@pytest.mark.gpu
@pytest.mark.skipif(GPU is not None, reason=str(GPU))
@pytest.mark.parametrize("places", [{}, IN_THREE_PLACES], ids=["whole", "split"])
def test_two_ranks_of_hybrid_on_one_gpu_have_the_bits_of_one(
    places: Mapping[int, Places],
) -> None:
    """FP32 experts of cuda and cpu_simd have the same bits, so a split changes none either."""
    where = installed_plugins()
    check_two_ranks(where, Mixture("hybrid", SIX, places=places), Mixture("hybrid", SIX))
