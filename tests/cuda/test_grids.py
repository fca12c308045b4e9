"""No batch needs a grid larger than CUDA allows: every launch of every block, without a GPU.

Arrays are shapes alone, so that a block can be called with millions of rows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from math import prod
from typing import Any

import numpy as np
import pytest
from lfm2kit_cuda.parts import CTAS_OF_SM, PART_KEYS

from lfm2kit import specs
from lfm2kit.batch import Batch
from lfm2kit.state import Room
from tests.core.small import random_weights, small_spec
from tests.cuda import late_cupy

MOST_X, MOST_YZ = 2**31 - 1, 65535
MODEL = small_spec()
PRECISIONS = ["fp32", "bf16", "fp32x3"]
Grid = tuple[int, int, int]


class Shape:
    """An array of which only the shape and the type are there."""

    def __init__(self, shape: Any, dtype: Any) -> None:
        self.shape = tuple(shape) if np.iterable(shape) else (shape,)
        self.dtype = np.dtype(dtype)

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, i: int) -> Shape:
        return Shape(self.shape[1:], self.dtype)

    def __iter__(self) -> Iterator[Shape]:
        return (self[i] for i in range(len(self)))

    def __int__(self) -> int:
        return 0

    def fill(self, value: int) -> None:
        pass


class Device:
    """The backend's modules for a chip, and the grids of what they launch, by kernel."""

    def __init__(self, chip: int) -> None:
        late_cupy.THREAD.device = chip
        self.grids: dict[str, list[Grid]] = {}
        cupy = sys.modules["cupy"]
        vars(cupy).update(
            empty=Shape, zeros=Shape, empty_like=lambda array: Shape(array.shape, array.dtype),
            float32=np.float32, int32=np.int32, uint16=np.uint16,
        )  # fmt: skip
        kernels, upload = (import_module(f"lfm2kit_cuda.{name}") for name in ("kernels", "upload"))
        kernels.load_kernel = self._load
        upload.upload = lambda array: Shape(array.shape, array.dtype)
        self.launching = import_module("lfm2kit_cuda.launching")
        self.sms = import_module("lfm2kit_cuda.device").sm_count

    def _load(self, stem: str, name: str, *constants: Any, **more: Any) -> Any:
        def launch(grid: Any, threads: int, *arguments: Any) -> None:
            if 0 not in grid:
                self.grids.setdefault(name, []).append((*grid, 1, 1)[:3])

        return launch

    def block(self, spec: specs.Spec, precision: str) -> Any:
        arithmetic = import_module("lfm2kit_cuda.arithmetic").arithmetic(precision)
        blocks = import_module("lfm2kit_cuda.backend").BLOCKS
        return blocks[type(spec)](spec, random_weights(spec), arithmetic)


@pytest.fixture(params=[0, 1], ids=["Hopper", "Ampere"])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    with late_cupy.loaded():
        yield Device(request.param)
    late_cupy.THREAD.device = 0


def inputs_of(spec: specs.Spec, batch: Batch, block: Any) -> list[Any]:
    """Return the arguments of a block for this batch, with a state if both have pages."""

    def rows(columns: int, dtype: Any = np.float32) -> Shape:
        return Shape((batch.tokens, columns), dtype)

    x = rows(MODEL.embed_tokens.hidden_size)
    of_kind: dict[str, list[Any]] = {
        "embed": [batch], "norm": [x, x], "rows": [x, x, batch], "layer": [x, x, batch],
        "choice": [rows(5)], "experts": [x, rows(3, np.int32), rows(3)],
        "conv": [x, batch], "attn": [x, batch],
    }  # fmt: skip
    given = of_kind.get(spec.kind, [x])
    if spec.has_state:
        room = Room(batch.pages.size, 64)
        given.append(block.new_state(room) if room.pages else None)
    return given


def all_specs() -> list[specs.Spec]:
    """Return one spec of each type that the backend builds, and layers of each kind."""
    layers = {(type(s.operator), type(s.feed_forward)): s for s in MODEL.layers}
    found = {type(spec): spec for spec in tree(MODEL)}
    del found[specs.Model], found[specs.Layer]
    return [*found.values(), *layers.values()]


def tree(spec: specs.Spec) -> Iterator[specs.Spec]:
    yield spec
    for part in spec.parts():
        yield from tree(part.spec)


def batch_of(sequences: int, tokens: int, page_tokens: int = 0) -> Batch:
    """Return a batch of equal sequences, in pages of their own if these are asked for."""
    width = -(-tokens // page_tokens) if page_tokens else 0
    ids = np.zeros((sequences, tokens), np.int32)
    pages = np.arange(sequences * width, dtype=np.int32).reshape(sequences, width)
    return Batch.of_sequences(list(ids), pages=pages)


BATCHES = {
    "70 000 sequences": lambda: batch_of(70_000, 1),
    "70 000 sequences in pages": lambda: batch_of(70_000, 1, 64),
    "a sequence of 10 million tokens": lambda: batch_of(1, 10_000_000),
    "a sequence of 10 million tokens in pages": lambda: batch_of(1, 10_000_000, 64),
}


@pytest.mark.parametrize("batch", [pytest.param(make, id=name) for name, make in BATCHES.items()])
def test_no_launch_is_larger_than_a_grid_may_be(device: Device, batch: Any) -> None:
    given = batch()
    for precision in PRECISIONS[: 3 if late_cupy.THREAD.device == 0 else 2]:
        for spec in all_specs():
            block = device.block(spec, precision)
            device.grids.clear()
            block_inputs = inputs_of(spec, given, block)
            block(*block_inputs)
            assert device.grids, spec
            for kernel, grids in device.grids.items():
                for x, y, z in grids:
                    assert 1 <= x <= MOST_X, (spec, kernel, (x, y, z))
                    assert 1 <= y <= MOST_YZ, (spec, kernel, (x, y, z))
                    assert 1 <= z <= MOST_YZ, (spec, kernel, (x, y, z))


def test_batches_without_rows_launch_nothing_that_has_rows(device: Device) -> None:
    """A step of which no token's logits are wanted has none for the head, for example."""
    given = Batch.of_sequences([])
    for precision in PRECISIONS[: 3 if late_cupy.THREAD.device == 0 else 2]:
        for spec in all_specs():
            block = device.block(spec, precision)
            device.grids.clear()
            block(*inputs_of(spec, given, block))
            assert not device.grids, spec


def test_small_batches_have_one_layer(device: Device) -> None:
    """What large batches need takes nothing from the others."""
    attention = next(s.operator for s in MODEL.layers if isinstance(s.operator, specs.Attention))
    block = device.block(attention, "fp32")
    block(Shape((64, 24), np.float32), batch_of(64, 1), None)
    assert device.grids["attend"] == [(1, 64, 2)]


@pytest.mark.parametrize("context", [127_000, 512, 256])
def test_few_rows_with_many_keys_are_shared_by_as_many_ctas_as_fill_the_device(
    device: Device, context: int
) -> None:
    """What a step is captured with is the width of the table."""
    attention = next(s.operator for s in MODEL.layers if isinstance(s.operator, specs.Attention))
    block, width = device.block(attention, "fp32"), context // 64
    pages = np.arange(width, dtype=np.int32)[None]
    batch = Batch.of_sequences([np.zeros(1, np.int32)], starts=[context - 1], pages=pages)
    block(*inputs_of(attention, batch, block))
    kv_heads, parts = attention.num_key_value_heads, -(-context // PART_KEYS)
    ctas = min(parts, -(-CTAS_OF_SM * device.sms() // kv_heads))
    assert device.grids["attend_parts"] == [(1, ctas, kv_heads)]


@pytest.mark.parametrize("count", [0, 1, 65535, 65536, 70_000, 131_070, 131_071, 10**7])
def test_layers_hold_all_and_hardly_more(device: Device, count: int) -> None:
    y, layers = device.launching.in_layers(count)
    assert y <= MOST_YZ
    assert count <= y * layers < count + layers
    assert layers == max(1, -(-count // MOST_YZ))


def test_a_chunk_of_many_pages_is_remembered_page_by_page(device: Device) -> None:
    conv = next(s.operator for s in MODEL.layers if isinstance(s.operator, specs.ShortConv))
    block, batch = device.block(conv, "fp32"), batch_of(1, 10_000_000, 64)
    block(*inputs_of(conv, batch, block))
    pages = sum(z for _, _, z in device.grids["remember"])
    assert pages == -(-(10_000_000 - 1) // 64) + 1
