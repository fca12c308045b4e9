"""Weights by name: views of a checkpoint's memory map, read only when a block asks for values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lfm2kit.errors import Lfm2kitError

DType = Literal["F32", "F16", "BF16"]

STORED_AS: dict[DType, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),  # NumPy has no bfloat16: the upper half of a float32's bits
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One weight as the checkpoint stores it; `data` is usually a view of a memory map.

    `data` has the tensor's shape, and the type `STORED_AS[dtype]`: raw bits for BF16.
    """

    name: str
    dtype: DType
    data: npt.NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def nbytes(self) -> int:
        return int(self.data.nbytes)

    def float32(self) -> npt.NDArray[np.float32]:
        """The values in float32, exactly and aligned; F32 as it lies if it can, and read-only."""
        if self.dtype == "BF16":
            return (self.data.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return np.require(self.data, np.float32, "A")  # a copy if the file holds it unaligned

    def stored_as(self, dtype: DType) -> Tensor:
        """The same values rounded to nearest, ties to even; this tensor if it is of `dtype`.

        Raises `Lfm2kitError` for values beyond F16's largest.
        """
        if self.dtype == dtype:
            return self
        values = self.float32()
        if dtype == "BF16":
            return Tensor(self.name, dtype, _bfloat16(values))
        with np.errstate(over="ignore"):
            stored = values.astype(STORED_AS[dtype])
        if np.any(np.isinf(stored) & np.isfinite(values)):
            raise Lfm2kitError(f"tensor '{self.name}' has values beyond F16's 65504; take BF16")
        return Tensor(self.name, dtype, stored)


def _bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The upper halves of the bits, rounded to nearest even; a NaN stays one."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(values), quiet_nan, rounded).astype(np.uint16)


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
        """The tensors whose names begin with `name.`, under the rest of their names."""
        return Weights(self._tensors, f"{self._prefix}{name}." if name else self._prefix)

    def float32(self, name: str) -> npt.NDArray[np.float32]:
        """The values of one tensor in float32."""
        return self[name].float32()

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, npt.ArrayLike]) -> Weights:
        """Weights that lie in memory as float32: for tests and small models."""
        return cls(
            {n: Tensor(n, "F32", np.asarray(a, dtype=np.float32)) for n, a in arrays.items()}
        )
