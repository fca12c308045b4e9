"""`--trim`: the bits of the whole model, from the rows that its logits depend on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lfm2kit import specs
from lfm2kit.backend import HOST, Batch, Block, Context, Spec
from lfm2kit.building.plugins import installed_plugins
from lfm2kit.checkpoint.config import LFM2_8B_A1B, model_spec
from lfm2kit.errors import Lfm2kitError
from lfm2kit.model import Forward
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.rewrites.trim import TRIM, TrimmedLayer, rows_of, trim
from lfm2kit.state import Room
from tests.core.small import build, small_spec
from tests.core.test_model import DeviceBackend, Elsewhere, FusingBackend, Recorded

C, A = "conv", "full_attention"
PATTERNS = {
    "as released": [A, C, C, A, C, C],
    "attention last": [C, C, A],
    "attention alone": [A],
    "one convolution": [C],
    "convolutions alone": [C, C, C, C],
    "convolutions after all": [A, C, C, C, C, C],
    "every second": [C, A, C, A, C],
}
LENGTHS = (16, 1, 2, 3, 4, 5, 6, 7, 8, 33)


def spec_of(pattern: str, **changes: object) -> specs.Model:
    types = PATTERNS[pattern]
    return small_spec(layer_types=types, num_hidden_layers=len(types), **changes)


def random_sequences(*lengths: int) -> list[Any]:
    rng = np.random.default_rng(len(lengths))
    return [rng.integers(50, size=n, dtype=np.int32) for n in lengths]


def asking_for(batch: Batch, rows: list[int]) -> Batch:
    return replace(batch, logits_rows=np.array(rows, np.int32))


def assert_same_bits(spec: specs.Model, batch: Batch, plan: str, **backends: Any) -> None:
    whole = build(spec, plan, backends).logits(batch).copy()
    trimmed = build(spec, plan, backends, rewrites=[TRIM]).logits(replace(batch))
    assert trimmed.shape == (len(batch.logits_rows), 50)
    assert np.array_equal(whole, trimmed)


@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_logits_keep_their_bits(pattern: str, kernel_size: int) -> None:
    spec = spec_of(pattern, conv_L_cache=kernel_size, conv_bias=kernel_size == 4)
    assert_same_bits(spec, Batch.of_sequences(random_sequences(*LENGTHS)), "reference")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_logits_keep_their_bits_in_vector_kernels(pattern: str) -> None:
    simd = installed_plugins().creator(Context())("cpu_simd")
    for lengths in (LENGTHS, [16] * 20, [1], [2, 1]):
        batch = Batch.of_sequences(random_sequences(*lengths))
        assert_same_bits(spec_of(pattern), batch, "simd", simd=simd)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [4],  # sequences of which nothing is wanted
        [15, 15, 17],  # one row twice
        [18, 3, 9, 0],  # in no order, and not the last ones
        list(range(19)),
    ],
)
@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_any_rows_may_be_wanted(pattern: str, kernel_size: int, rows: list[int]) -> None:
    batch = asking_for(Batch.of_sequences(random_sequences(10, 1, 6, 2)), rows)
    assert_same_bits(spec_of(pattern, conv_L_cache=kernel_size), batch, "reference")


def test_a_batch_of_no_sequences_gives_no_logits() -> None:
    model = build(spec_of("as released"), rewrites=[TRIM])
    assert model.logits(Batch.of_sequences([])).shape == (0, 50)


@pytest.mark.parametrize(
    "plan", ["device", "device,router=reference", "reference,attn=device,rows=device,5=device"]
)
def test_batches_cross_the_seams(plan: str) -> None:
    batch = Batch.of_sequences(random_sequences(*LENGTHS))
    assert_same_bits(spec_of("as released"), batch, plan, device=DeviceBackend())


class Rows:
    """A count of the rows that come into each block and go out of it, where they are rows."""

    def __init__(self) -> None:
        self.seen: dict[str, tuple[int, int]] = {}

    def wrap(self, name: str, spec: Spec, block: Block) -> Block:
        def counted(*inputs: Any) -> Any:
            result = block(*inputs)
            first = result[0] if isinstance(result, tuple) else result
            if isinstance(inputs[0], np.ndarray):
                self.seen[name] = len(inputs[0]), len(first)
            return result

        return counted


def test_as_released_5_and_3_rows_of_16_and_the_last_are_left() -> None:
    """The last six layers of LFM2-8B-A1B: attention, conv, conv, attention, conv, conv."""
    rows = Rows()
    model = build(spec_of("as released"), rewrites=[TRIM], wrap=rows.wrap)
    model.logits(Batch.of_sequences(random_sequences(*[16] * 10)))
    for i, (came, went) in enumerate([(16, 16)] * 3 + [(16, 5), (5, 3), (3, 1)]):
        assert rows.seen[f"layers.{i}"] == (10 * came, 10 * went)
        assert rows.seen[f"layers.{i}.operator"] == (10 * came, 10 * came)
        assert rows.seen[f"layers.{i}.feed_forward"] == (10 * went, 10 * went)
    assert rows.seen["embedding_norm"] == (10, 10)


def test_the_released_model_is_trimmed_in_its_last_three_layers() -> None:
    spec = model_spec(LFM2_8B_A1B, tied=True)
    layers = enumerate(trim(spec).layers)
    kept = {i: layer.rows_out for i, layer in layers if isinstance(layer, TrimmedLayer)}
    assert kept == {21: 5, 22: 3, 23: 1}
    assert trim(spec).parameters() == spec.parameters()


def test_the_work_is_that_of_the_rows_which_are_left() -> None:
    spec = model_spec(LFM2_8B_A1B, tied=True)
    batch = Batch.of_sequences([[0] * 16] * 16)

    def flops(tokens: int, *blocks: Spec) -> float:
        rows = Batch.of_sequences([[0]] * tokens)
        return sum(block.work(rows).flops for block in blocks)

    left_out = 0.0
    for layer, came, went in zip(spec.layers[21:], (16, 5, 3), (5, 3, 1), strict=True):
        if isinstance(layer.operator, specs.ShortConv):
            before = layer.operator_norm, layer.operator
            left_out += flops(16 * 16, *before) - flops(16 * came, *before)
        after = layer.ffn_norm, layer.feed_forward
        left_out += flops(16 * 16, *after) - flops(16 * went, *after)
    whole = spec.work(batch).flops
    assert whole - trim(spec).work(batch).flops == pytest.approx(left_out, rel=1e-9)
    assert 0.09 < left_out / whole < 0.1


@pytest.mark.parametrize(
    ("fused", "count"), [(specs.SparseMoe, 4), (specs.Layer, 3), (specs.Model, 0)]
)
def test_what_a_backend_builds_whole_stays_so_before_the_trimmed_layers(
    fused: type[Spec], count: int
) -> None:
    backend = FusingBackend(fused, Forward)
    spec, batch = spec_of("as released"), Batch.of_sequences(random_sequences(*LENGTHS))
    trimmed = build(spec, "fusing", {"fusing": backend}, rewrites=[TRIM]).logits(batch)
    assert np.array_equal(trimmed, build(spec).logits(batch))
    assert backend.made == count


class ReplayingBackend(DeviceBackend):
    """A backend like one with graphs: a replay changes the ids in place, and nothing else."""

    def capture(self, forward: Callable[[Batch], Any], batch: Batch) -> Recorded:
        there = replace(batch).on(self.there)
        forward(there)

        def replayed(batch: Batch) -> Any:
            there.on(HOST).token_ids[:] = batch.token_ids  # where `DeviceBlock` reads them
            before = self.there.crossings
            logits = forward(there)
            assert self.there.crossings == before, "a graph records no copies from the host"
            return logits

        return Recorded(replayed, 1, [0])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_captured_forward_copies_nothing_and_follows_the_ids(pattern: str) -> None:
    spec, backend = spec_of(pattern), ReplayingBackend()
    model, whole = build(spec, "replaying", {"replaying": backend}, rewrites=[TRIM]), build(spec)
    rng = np.random.default_rng(1)
    for _ in range(3):
        batch = Batch.of_sequences([rng.integers(50, size=n) for n in LENGTHS])
        assert np.array_equal(model.logits(batch), whole.logits(batch))


def test_rows_of_a_batch_are_found_once_in_each_memory() -> None:
    batch, there = Batch.of_sequences(random_sequences(16, 3)), Elsewhere()
    rows = rows_of(batch, 4, 2)
    assert rows_of(batch, 4, 2) is rows
    assert rows_of(batch.on(there), 4, 2) is rows.on(there)
    assert rows.cu_seqlens.tolist() == [0, 5, 8]
    assert rows.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert rows.logits_rows.tolist() == [2, 3, 4, 5, 6, 7]
    assert rows.logits_rows.dtype == rows.positions.dtype == np.int32
    assert batch.logits_rows.tolist() == [15, 18]
    assert rows_of(asking_for(batch, [15]), 4, 2).cu_seqlens.tolist() == [0, 5]


def test_a_trimmed_model_has_no_state() -> None:
    with pytest.raises(Lfm2kitError, match="a trimmed model has no state"):
        build(spec_of("as released"), rewrites=[TRIM]).new_state(Room(1))


def test_a_backend_without_a_block_for_rows_in_a_layer_says_who_has_it() -> None:
    class NoRows(ReferenceBackend):
        def why_unsupported(self, spec: Spec) -> str | None:
            return "no rows" if spec.kind == "rows" else super().why_unsupported(spec)

    with pytest.raises(Lfm2kitError, match=r"layers\.5\.last_rows.*reference can build it"):
        build(spec_of("as released"), "reference,5=norows", {"norows": NoRows()}, rewrites=[TRIM])
