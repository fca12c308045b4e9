"""Random weights for any spec, such that no mistake can hide behind their symmetry."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, permutations

import numpy as np
import numpy.typing as npt

from lfm2kit.formats import BF16, F16, Format
from lfm2kit.specs import Shape, Spec
from lfm2kit.weights import Tensor, Weights

Float32 = npt.NDArray[np.float32]

# Values that are drawn for a tensor, and then come again: a prime, so that no two rows are equal.
PERIOD = 131_071


def random_weights(spec: Spec, rng: np.random.Generator | int = 0) -> Weights:
    """Return float32 weights for all of `spec.parameters()`, read-only as a memory map is.

    Matrices keep the size of what goes through them (1 / sqrt(fan_in)); w3 is smaller than w1, the
    taps of a convolution differ in size, norm weights are 1 + 0.2 N(0, 1), biases are nonzero.
    The expert bias has a standard deviation of 0.3: with one of 0, as models are initialised, a
    router that adds it to the weights, or forgets it, selects the very same experts.
    """
    rng = np.random.default_rng(rng)
    return frozen_weights({n: _values(n, s, rng) for n, s in spec.parameters().items()})


def frozen_weights(arrays: Mapping[str, Float32]) -> Weights:
    """Return weights that raise ValueError if a block writes them."""
    for array in arrays.values():
        array.flags.writeable = False
    return Weights.of_arrays(arrays)


def stored_as(weights: Weights, format: Format) -> Weights:
    """Return the weights rounded to another format; the expert bias stays F32, as in files."""
    return Weights(
        {n: t if n.endswith("expert_bias") else _stored(t, format) for n, t in weights.items()}
    )


def in_int8(weights: Weights) -> Weights:
    """Return the weights in a format that no backend knows: int8, a scale per row.

    The scales are powers of two, so that BF16 holds the values.
    """
    return Weights({n: _in_int8(t) for n, t in weights.items()})


def mixtures(weights: Weights) -> Iterator[Weights]:
    """Yield the weights stored in four formats, F32, BF16, F16 and one that no backend knows.

    Any two tensors are stored in any two different formats in one of the mixtures: written in base
    4, their numbers differ in a digit, and the even permutations of four put any pair of digits at
    any pair of formats.
    """
    stored = [weights, *(_all_stored_as(weights, f) for f in (BF16, F16)), in_int8(weights)]
    for place in range(len(np.base_repr(len(weights) - 1, 4)) if weights else 0):
        for order in filter(_is_even, permutations(range(4))):
            digits = {name: i // 4**place % 4 for i, name in enumerate(weights)}
            yield Weights({n: stored[order[digit]][n] for n, digit in digits.items()})


def _is_even(order: Sequence[int]) -> bool:
    return sum(a > b for a, b in combinations(order, 2)) % 2 == 0


def _all_stored_as(weights: Weights, format: Format) -> Weights:
    return Weights({n: _stored(t, format) for n, t in weights.items()})


def with_values_of(weights: Weights, format: Format) -> Weights:
    """Return float32 weights, all matrices but a router's rounded to values of `format`."""
    return frozen_weights({n: _rounded(n, t, format) for n, t in weights.items()})


def seed_of(name: str) -> int:
    """Return a seed that belongs to a name, the same on every machine and day."""
    return zlib.crc32(name.encode())


def _values(name: str, shape: Shape, rng: np.random.Generator) -> Float32:
    values = rng.standard_normal(min(math.prod(shape), PERIOD), dtype=np.float32)
    if "norm" in name or (len(shape) == 1 and name == "weight"):
        values = 1 + 0.2 * values
    elif name.endswith("expert_bias"):
        values *= 0.3
    elif name.endswith("bias"):
        values *= 0.5
    elif not name.endswith("conv.weight"):
        values *= shape[-1] ** -0.5 * (0.6 if name.endswith("w3.weight") else 1.0)
    whole: Float32 = np.resize(values, shape)
    if name.endswith("conv.weight"):
        whole *= np.linspace(0.4, 1.2, shape[-1], dtype=np.float32)
    return whole


def _rounded(name: str, tensor: Tensor, format: Format) -> Float32:
    is_rounded = len(tensor.shape) == 2 and not name.endswith("gate.weight")
    return (tensor.stored_as(format) if is_rounded else tensor).float32()


def _scaled(data: npt.NDArray[np.int8], scales: Float32) -> Float32:
    return data.astype(np.float32) * scales[..., None]


INT8 = Format("int8 and a scale per row", 1, np.dtype(np.int8), _scaled)


def _in_int8(tensor: Tensor) -> Tensor:
    values = tensor.float32()
    largest = np.max(np.abs(values), axis=-1, initial=np.finfo(np.float32).tiny)
    scales = np.asarray(np.exp2(np.ceil(np.log2(largest / 127))), np.float32)
    data = np.rint(values / scales[..., None]).astype(np.int8)
    return Tensor(tensor.name, INT8, tensor.shape, data, (scales,))


def _stored(tensor: Tensor, format: Format) -> Tensor:
    stored = tensor.stored_as(format)
    stored.data.flags.writeable = False
    return stored
