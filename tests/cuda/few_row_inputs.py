"""What the tests of products of few rows multiply on a GPU: the release's sizes and odd ones."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lfm2kit.backend import BF16, Tensor

Float32 = npt.NDArray[np.float32]

SHAPES = ((6144, 2048), (2048, 2048), (2048, 7168), (65536, 2048), (101, 69), (33, 300))  # out, in
TAKEN = 4  # experts of a token


def random(rng: np.random.Generator, *shape: int) -> Float32:
    return rng.standard_normal(shape, dtype=np.float32)


def tensors(rng: np.random.Generator, groups: int, *shape: int, scale: float = 1.0) -> list[Tensor]:
    """Return a matrix for each group."""
    factor = np.float32(scale)
    values = (factor * random(rng, *shape) for _ in range(groups))
    return [Tensor.of_array("w", matrix).stored_as(BF16) for matrix in values]


def uneven_choice(rng: np.random.Generator, tokens: int, experts: int) -> npt.NDArray[np.int32]:
    """Return the experts of each token: a few get more rows than a tile has, and some get none."""
    chances = rng.random(experts) ** 3
    order = (rng.random((tokens, experts)) * chances).argsort(axis=1)
    return np.ascontiguousarray(order[:, -TAKEN:], np.int32)
