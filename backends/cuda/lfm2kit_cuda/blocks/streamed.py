"""Experts whose weights pass through slots: see `lfm2kit_cuda.slots`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from typing import NamedTuple

import cupy

from lfm2kit import specs
from lfm2kit.backend import Weights
from lfm2kit.rewrites import StreamedExperts as Spec
from lfm2kit_cuda.blocks.feed_forward import Experts
from lfm2kit_cuda.kernels import load_kernel
from lfm2kit_cuda.pinned import empty_pinned
from lfm2kit_cuda.products import Arithmetic, Matrix
from lfm2kit_cuda.slots import Bytes, Slots
from lfm2kit_cuda.sums import add


class StreamedExperts:
    """Multiplies with one portion of experts after the other, and adds the results."""

    def __init__(self, spec: Spec, weights: Weights, gemm: Arithmetic, slots: Slots | None) -> None:
        """Use the slots of the model that this is a part of, or make them if there are none."""
        parts = [replace(spec.experts, local_experts=ids) for ids in spec.portions]
        packed = [_packed(part, weights, gemm) for part in parts]
        nbytes = spec.experts_per_slot * packed[0].bytes_each
        if slots is None or slots.form != (spec.slots, nbytes):
            slots = Slots(spec.slots, nbytes)
        self.slots = slots
        self.portions = [Portion(*part, gemm, slots) for part in zip(parts, packed, strict=True)]

    def __call__(
        self, x: cupy.ndarray, expert_ids: cupy.ndarray, expert_weights: cupy.ndarray
    ) -> cupy.ndarray:
        rounded = self.portions[0].gemm.rounded(x)
        return reduce(add, (p.of(rounded, expert_ids, expert_weights) for p in self.portions))


class _Packed(NamedTuple):
    """The matrices of some experts as products read them, first w1 and w3, then w2, of each."""

    portion: Bytes
    matrices: tuple[Matrix, Matrix]  # of the first expert alone: what the others look like

    @property
    def bytes_each(self) -> int:
        return sum(int(matrix.packed.nbytes) for matrix in self.matrices)


class Portion(Experts):
    """A few experts, which are in a slot while they are multiplied with."""

    def __init__(
        self, spec: specs.Experts, packed: _Packed, gemm: Arithmetic, slots: Slots
    ) -> None:
        self._prepare(spec, gemm)
        self._slots = slots
        self._number = slots.add(packed.portion)
        self._fence = load_kernel("after_copies", "after_copies")
        w13, w2 = packed.matrices
        place = slots.slot_of(self._number)
        count = len(spec.local_experts)
        middle = count * w13.packed.nbytes
        self.w13 = _laid(w13, count, place[:middle])
        self.w2 = _laid(w2, count, place[middle : middle + count * w2.packed.nbytes])

    @contextmanager
    def matrices(self) -> Iterator[tuple[Matrix, Matrix]]:
        with self._slots.holding(self._number):
            self._fence((1,), 1)
            yield self.w13, self.w2


def _laid(matrix: Matrix, count: int, place: cupy.ndarray) -> Matrix:
    """Return matrices like the one of `matrix`, one after the other in these bytes."""
    shape = count, *matrix.packed.shape[1:]
    return replace(matrix, packed=place.view(matrix.packed.dtype).reshape(shape))


def _packed(spec: specs.Experts, weights: Weights, gemm: Arithmetic) -> _Packed:
    """Return the experts packed in pinned memory; on the device one after the other is packed."""
    ids, portion, first = spec.local_experts, None, None
    for i, e in enumerate(ids):
        gate, up, down = (weights[f"experts.{e}.{name}.weight"] for name in ("w1", "w3", "w2"))
        matrices = gemm.pack_gated([gate], [up]), gemm.pack_down([down])
        sizes = [int(matrix.packed.nbytes) for matrix in matrices]
        if portion is None or first is None:
            portion, first = empty_pinned(len(ids) * sum(sizes)), matrices
        places = i * sizes[0], len(ids) * sizes[0] + i * sizes[1]
        for matrix, place, size in zip(matrices, places, sizes, strict=True):
            matrix.packed.data.copy_to_host_async(portion.ctypes.data + place, size)
    assert portion is not None
    assert first is not None
    return _Packed(portion, first)
