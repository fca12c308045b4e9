"""Streamed experts have their own weights whenever they multiply, on a CuPy that works late."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lfm2kit import specs
from lfm2kit.backend import Batch
from lfm2kit.rewrites import StreamedExperts
from tests.core.small import random_weights
from tests.cuda import late_cupy
from tests.cuda.late_cupy import Array, current_stream

H, INNER, EXPERTS = 8, 4, 9
BATCH = Batch.of_sequences([[1, 2, 3]])
LAYERS = [(3, 0, 8, 5, 1), (7,), (2, 4, 6, 1), (0, 1, 2, 3, 4, 5, 6, 7)]
SLOTS = [(1, 1), (2, 1), (3, 2), (2, 8), (4, 2), (20, 1)]  # and experts in each


def spec_of(position: int, ids: tuple[int, ...], slots: tuple[int, int]) -> StreamedExperts:
    return StreamedExperts(specs.Experts(H, INNER, EXPERTS, 2, ids), position, *slots)


class Gemm:
    """Packs matrices as they are, w1 before w3."""

    def __init__(self, matrix: Any) -> None:
        self.matrix = matrix

    def pack_gated(self, gates: Any, ups: Any) -> Any:
        return self._packed([*gates, *ups])

    def pack_down(self, matrices: Any) -> Any:
        return self._packed(matrices)

    def _packed(self, tensors: Any) -> Any:
        values = np.concatenate([t.float32() for t in tensors])[None]
        packed = late_cupy.empty(values.shape, np.float32)
        current_stream().add(lambda: np.copyto(packed.values, values))
        return self.matrix(packed, 0, 0, 0)


class Model:
    """Blocks of several layers, whose products note the matrices that they find."""

    def __init__(self, modules: SimpleNamespace, slots: tuple[int, int], *, is_hasty: bool) -> None:
        self.memory = modules.memory.memory_of(1)
        gemm, shared = Gemm(modules.products.Matrix), None
        self.blocks, self.weights = [], []
        with self.memory.stream():
            for position, ids in enumerate(LAYERS):
                spec = spec_of(position, ids, slots)
                weights = random_weights(spec, seed=position)
                block = modules.streamed.StreamedExperts(spec, weights, gemm, shared)
                shared = block.slots
                self.blocks.append(block)
                self.weights.append(weights)
            current_stream().synchronize()
        assert all(block.slots is shared for block in self.blocks)
        shared._link.stream.is_hasty = is_hasty

    def forward(self, batch: Batch | None = None) -> Array:
        """Return the bytes of all matrices in the order in which products read them."""
        size = sum(map(len, LAYERS)) * 3 * H * INNER
        found, at = late_cupy.empty(size, np.float32), 0
        for block in self.blocks:
            for portion in block.portions:
                with portion.matrices() as matrices:
                    for matrix in matrices:
                        at = self._note(found, at, matrix.packed)
        assert at == size
        return found

    def _note(self, found: Array, at: int, packed: Array) -> int:
        end = at + packed.values.size
        current_stream().add(lambda: np.copyto(found.values[at:end], packed.values.reshape(-1)))
        return end

    def expected(self, slots: tuple[int, int]) -> Any:
        found = []
        for ids, weights in zip(LAYERS, self.weights, strict=True):
            for portion in spec_of(0, ids, slots).portions:
                for names in (("w1", "w3"), ("w2",)):
                    for e in portion:
                        for name in names:
                            matrix = weights[f"experts.{e}.{name}.weight"].float32()
                            found.append(matrix.reshape(-1))
        return np.concatenate(found)

    def read(self, call: Any) -> Any:
        with self.memory.stream():
            return self.memory.to_host(call(BATCH))


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    names = ("blocks.streamed", "capture", "memory", "products")
    with late_cupy.loaded(*names) as (streamed, capture, memory, products):
        monkeypatch.setattr(streamed, "load_kernel", lambda *name: lambda grid, threads: None)
        yield SimpleNamespace(streamed=streamed, capture=capture, memory=memory, products=products)


@pytest.mark.parametrize("is_hasty", [False, True], ids=["late", "early"])
@pytest.mark.parametrize("slots", SLOTS, ids=str)
def test_every_product_finds_its_own_experts(
    modules: SimpleNamespace, slots: tuple[int, int], is_hasty: bool
) -> None:
    """Of its own layer, in the order of its ids, plain and in replays."""
    model = Model(modules, slots, is_hasty=is_hasty)
    expected = model.expected(slots)
    replay = modules.capture.Replay(model.forward, BATCH, model.memory)
    for call in (model.forward, model.forward, replay, replay, model.forward, replay):
        assert np.array_equal(model.read(call), expected)


def test_memory_is_pinned_when_blocks_are_built_and_never_again(
    modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of exactly the bytes of the weights."""
    pinned: list[int] = []
    empty_pinned = modules.streamed.empty_pinned
    monkeypatch.setattr(
        modules.streamed, "empty_pinned", lambda n: (pinned.append(n), empty_pinned(n))[1]
    )
    model = Model(modules, (4, 2), is_hasty=False)
    assert sum(pinned) == sum(map(len, LAYERS)) * 3 * H * INNER * 4
    count = len(pinned)
    replay = modules.capture.Replay(model.forward, BATCH, model.memory)
    for call in (model.forward, replay):
        model.read(call)
    assert len(pinned) == count


def test_slots_of_another_form_are_not_used(modules: SimpleNamespace) -> None:
    """As where a single block is built after a model of larger experts, or with fewer slots."""
    gemm = Gemm(modules.products.Matrix)
    with modules.memory.memory_of(1).stream():
        ids = LAYERS[0]
        first = modules.streamed.StreamedExperts(
            spec_of(0, ids, (3, 1)), random_weights(spec_of(0, ids, (3, 1))), gemm, None
        )
        other = modules.streamed.StreamedExperts(
            spec_of(1, ids, (4, 2)), random_weights(spec_of(1, ids, (4, 2))), gemm, first.slots
        )
    assert other.slots is not first.slots
    assert (first.slots.form[0], other.slots.form[0]) == (3, 4)


def test_pinned_memory_that_the_system_refuses_is_a_memory_error(
    modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    class RefusedError(RuntimeError):
        status = 2

    def refuse(nbytes: int, flags: int) -> None:
        raise RefusedError

    pinned = modules.streamed.empty_pinned.__globals__
    monkeypatch.setattr(pinned["cupy"].cuda, "PinnedMemory", refuse)
    with pytest.raises(MemoryError, match=r"does not pin 3\.0 GB more"):
        modules.streamed.empty_pinned(3_000_000_000)
    RefusedError.status = 1
    with pytest.raises(RefusedError):
        modules.streamed.empty_pinned(1)
