"""Random weights: values by name, place and seed, made when they are asked for."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lfm2kit.checkpoint.pieces import PIECE
from lfm2kit.weights import Tensor

Shapes = Mapping[str, tuple[int, ...]]

NAN = np.float32(np.nan)


class RandomTensors(Mapping[str, Tensor]):
    """Random tensors of these shapes; each is made anew, with the same values, when it is read."""

    def __init__(self, shapes: Shapes, seed: int) -> None:
        self._shapes = shapes
        self._seed = seed

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        values = random_values(name, shape, self._seed, 0, math.prod(shape))
        return Tensor.of_array(name, values.reshape(shape))

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def without_values(shapes: Shapes) -> dict[str, Tensor]:
    """Return tensors of these shapes that take no memory: every value is the same NaN."""
    return {n: Tensor.of_array(n, np.broadcast_to(NAN, shape)) for n, shape in shapes.items()}


def random_values(name: str, shape: Sequence[int], seed: int, begin: int, end: int) -> Any:
    """Return elements `begin` to `end` of a flat tensor, float32.

    They keep activations of order 1 and tell implementations apart: matrices have std
    1 / sqrt(inputs), norms are 1 +- 0.1, the router's bias has std 0.1.  With a bias of 0, as
    models are initialised, half of all routing bugs change nothing.  A value depends on the
    tensor's name, its place there and the seed alone.
    """
    return _scaled(name, shape, _normal(seed, name, begin, end))


def _normal(seed: int, name: str, begin: int, end: int) -> Any:
    """Return elements `begin` to `end` of a tensor of normal values.

    Every `PIECE` of them has a generator of its own, so that threads can make them in any order.
    """
    first = begin // PIECE
    key = zlib.crc32(name.encode())
    pieces = [
        np.random.default_rng([seed, key, i]).standard_normal(
            min(PIECE, end - i * PIECE), dtype=np.float32
        )
        for i in range(first, -(-end // PIECE))
    ]
    whole = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    return whole[begin - first * PIECE :]


def _scaled(name: str, shape: Sequence[int], values: Any) -> Any:
    if "norm" in name:
        return 1 + np.float32(0.1) * values
    if name.endswith("bias"):
        return np.float32(0.1) * values
    if name.endswith(("embed_tokens.weight", "lm_head.weight")):  # logits of std 3
        return values * np.float32(3 / math.sqrt(shape[1]))
    return values / np.float32(math.sqrt(math.prod(shape[1:])))
