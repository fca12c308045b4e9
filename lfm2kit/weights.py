"""Weights by name: views of a checkpoint's memory map, read only when a block asks for values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from reprlib import repr as brief  # of what a format returns, however long it is
from typing import Any

import numpy as np
import numpy.typing as npt

from lfm2kit.errors import Lfm2kitError
from lfm2kit.formats import F32, Format
from lfm2kit.plugin_faults import blaming


@dataclass(frozen=True, slots=True)
class Tensor:
    """A weight as the checkpoint stores it; its arrays are usually views of memory maps.

    `data` has the shape `format.blocks(shape)` and the type `format.block`.  `beside` are further
    arrays that `format.unpack` needs, such as scales.  Each has the tensor's leading dimensions
    (all but the last), so that rows and experts can be taken without unpacking anything:
    `np.broadcast_to` gives a scale of the whole tensor this form, without a copy.

    Raise ValueError if an array does not fit the shape.
    """

    name: str
    format: Format
    shape: tuple[int, ...]
    data: npt.NDArray[Any]
    beside: tuple[npt.NDArray[Any], ...] = ()

    def __post_init__(self) -> None:
        leading, expected = self.shape[:-1], self.format.blocks(self.shape)
        if self.data.shape != expected or self.data.dtype != self.format.block:
            raise ValueError(
                f"tensor '{self.name}' {list(self.shape)} in {self.format}: its data are "
                f"{list(self.data.shape)} of {self.data.dtype}, expected {list(expected)} of "
                f"{self.format.block}"
            )
        for array in self.beside:
            if array.shape[: len(leading)] != leading:
                raise ValueError(
                    f"tensor '{self.name}' {list(self.shape)} in {self.format}: an array beside "
                    f"its data is {list(array.shape)}; it must begin with {list(leading)}"
                )

    @classmethod
    def of_array(cls, name: str, array: npt.NDArray[Any], format: Format = F32) -> Tensor:
        """Return a tensor of `array`'s shape, in a format with one value in a block."""
        return cls(name, format, array.shape, array)

    @property
    def arrays(self) -> tuple[npt.NDArray[Any], ...]:
        """Return the data and what lies beside them."""
        return (self.data, *self.beside)

    @property
    def nbytes(self) -> int:
        """Return the bytes of the tensor as stored; what is broadcast beside counts once."""
        return self.format.nbytes(self.shape) + sum(map(_stored_bytes, self.beside))

    @property
    def size(self) -> int:
        """Return the number of values."""
        return math.prod(self.shape)

    def __getitem__(self, index: Any) -> Tensor:
        """Return some rows, as stored: `index` is NumPy's, for any dimensions but the last."""
        data = self.data[index]
        shape = (*data.shape[:-1], *self.shape[-1:])
        return Tensor(self.name, self.format, shape, data, tuple(a[index] for a in self.beside))

    def float32(self) -> npt.NDArray[np.float32]:
        """Return the values in float32, exactly and aligned; F32 data may be the file's own.

        They are then read-only.  Raise `Lfm2kitError` if the format raises anything, or unpacks
        something else than float32 values of all blocks.
        """
        if self.size == 0:  # formats need not know how to unpack nothing
            return np.empty(self.shape, np.float32)
        unpacking = f"format {self.format}, unpacking tensor '{self.name}' {list(self.shape)},"
        with blaming(unpacking):
            values = self.format.unpack(*self.arrays)
        *leading, blocks = self.data.shape or (1,)
        whole = (*leading, blocks * self.format.block_values) if self.shape else ()
        if getattr(values, "shape", None) != whole or values.dtype != np.float32:
            raise Lfm2kitError(
                f"{unpacking} returned {_form(values)}, not {list(whole)} of float32"
            )
        if self.shape:
            values = values[..., : self.shape[-1]]  # a row's last block may be padded
        return np.require(values, np.float32, "A")  # a copy if the file holds it unaligned

    def flat(self, begin: int, end: int) -> Tensor:
        """Return the values `begin` to `end` in one dimension.

        They are as stored where each has an element of its own, else in F32.
        """
        if self.format.block_values == 1 and not self.beside:
            return Tensor.of_array(self.name, self.data.reshape(-1)[begin:end], self.format)
        columns = max(1, *self.shape[-1:])
        first, last = begin // columns, -(-end // columns)
        rows = np.unravel_index(np.arange(first, last), self.shape[:-1]) if self.shape[:-1] else ()
        values = self[rows].float32().reshape(-1)
        return Tensor.of_array(self.name, values[begin - first * columns : end - first * columns])

    def stored_as(self, format: Format) -> Tensor:
        """Return the same values, rounded to a format that can be packed.

        The tensor itself if it is stored so.  Raise `Lfm2kitError` for values beyond F16's
        largest, and for a format that can only be read.
        """
        if self.format == format:
            return self
        if format.pack is None:
            raise Lfm2kitError(f"tensor '{self.name}': {format} can be read, but not written")
        try:
            packed = format.pack(self.float32())
        except OverflowError as error:
            raise Lfm2kitError(f"tensor '{self.name}' has {error}") from None
        data, *beside = packed if isinstance(packed, tuple) else (packed,)
        return Tensor(self.name, format, self.shape, data, tuple(beside))


def _form(values: Any) -> str:
    """Say what `values` are: their shape and type, if they are an array."""
    if isinstance(values, np.ndarray):
        return f"{list(values.shape)} of {values.dtype}"
    return brief(values)


def _stored_bytes(array: npt.NDArray[Any]) -> int:
    dimensions = zip(array.shape, array.strides, strict=True)
    return int(array.itemsize * math.prod(n for n, step in dimensions if step or n == 0))


class Weights(Mapping[str, Tensor]):
    """Tensors by name below a scope: "w1.weight" for "layers.0.feed_forward.w1.weight"."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
        self._tensors = tensors
        self._prefix = prefix

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        start = len(self._prefix)
        return (name[start:] for name in self._tensors if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def scope(self, name: str) -> Weights:
        """Return the tensors whose names begin with `name.`, under the rest of their names."""
        return Weights(self._tensors, f"{self._prefix}{name}." if name else self._prefix)

    def float32(self, name: str) -> npt.NDArray[np.float32]:
        """Return the values of one tensor in float32."""
        return self[name].float32()

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, npt.ArrayLike]) -> Weights:
        """Return weights that lie in memory as float32: for tests and small models."""
        return cls(
            {n: Tensor.of_array(n, np.asarray(a, dtype=np.float32)) for n, a in arrays.items()}
        )
