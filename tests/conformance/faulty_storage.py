"""Backends that misread weights: by another's type, without scales, or rounded as others are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lfm2kit import specs
from lfm2kit.backend import BF16, F16, Backend, Format, Tensor, Weights
from lfm2kit.reference.backend import BLOCKS
from tests.conformance.broken import BrokenBackend

MLP, CONV, ATTENTION, NORM = specs.MLP, specs.ShortConv, specs.Attention, specs.RMSNorm
EXPERTS, ROUTER, CHOICE = specs.Experts, specs.Router, specs.Choice

Read = Callable[[str, Weights], Tensor]


def reading(kind: Any, read: Read) -> BrokenBackend:
    """Return the reference, one kind of whose blocks reads its tensors so."""

    def build(spec: Any, weights: Weights) -> Any:
        return BLOCKS[kind](spec, Weights({n: read(n, weights) for n in spec.parameters()}))

    return BrokenBackend({kind: build})


def by_type(tensor: Tensor, format: Format) -> Tensor:
    """Read a tensor's bits in a format whose elements are as large, others as they are."""
    if format.block.itemsize != tensor.format.block.itemsize or tensor.beside:
        return tensor
    return Tensor(tensor.name, format, tensor.shape, tensor.data.view(format.block))


def as_the_first(name: str, weights: Weights) -> Tensor:
    """Ask the first tensor alone which of the types of 16 bits it has."""
    return by_type(weights[name], next(iter(weights.values())).format)


def as_expert_0(name: str, weights: Weights) -> Tensor:
    """Ask the first expert's tensor of this name."""
    _, _, rest = name.split(".", 2)
    return by_type(weights[name], weights[f"experts.0.{rest}"].format)


def as_the_matrix(name: str, weights: Weights) -> Tensor:
    """Take a bias for stored as its matrix is."""
    matrix = name.replace(".bias", ".weight")
    return by_type(weights[name], weights[matrix].format)


def keys_as_queries(name: str, weights: Weights) -> Tensor:
    return by_type(weights[name], weights[name.replace("k_", "q_").replace("v_", "q_")].format)


def rounded_with(first: str) -> Read:
    """Pack all matrices in the narrower of the first one's type and their own."""

    def read(name: str, weights: Weights) -> Tensor:
        tensor, narrow = weights[name], weights[first].format
        return tensor.stored_as(narrow) if narrow in (BF16, F16) else tensor

    return read


def raw(ending: str) -> Read:
    """Take the data of tensors of some name for values, whatever their format is."""

    def read(name: str, weights: Weights) -> Tensor:
        tensor = weights[name]
        if not name.endswith(ending):
            return tensor
        return Tensor.of_array(name, tensor.data.astype(np.float32))

    return read


def known_types_of(ending: str) -> Read:
    """Unpack BF16, and take the data of any other format for values."""

    def read(name: str, weights: Weights) -> Tensor:
        return weights[name] if weights[name].format == BF16 else raw(ending)(name, weights)

    return read


def scale_of_the_first_row(name: str, weights: Weights) -> Tensor:
    """Read one scale for a whole matrix."""
    tensor = weights[name]
    beside = tuple(np.broadcast_to(one.reshape(-1)[:1], one.shape) for one in tensor.beside)
    return Tensor(name, tensor.format, tensor.shape, tensor.data, beside)


UNIFORM, UNKNOWN = "bf16-and-f16-weights", "weights-in-an-unknown-format"
MIXED = "weights-of-several-types"

MUTANTS: dict[str, tuple[Backend, tuple[str, ...]]] = {
    "w2_read_as_w1": (reading(MLP, as_the_first), (MIXED,)),
    "experts_read_as_the_first": (reading(EXPERTS, as_expert_0), (MIXED,)),
    "biases_read_as_matrices": (reading(CONV, as_the_matrix), (MIXED,)),
    "keys_read_as_queries": (reading(ATTENTION, keys_as_queries), (MIXED,)),
    "taps_read_as_in_proj": (reading(CONV, as_the_first), (MIXED,)),
    "w2_rounded_with_w1": (reading(MLP, rounded_with("w1.weight")), (MIXED,)),
    "norms_rounded_with_q_proj": (reading(ATTENTION, rounded_with("q_proj.weight")), (MIXED,)),
    "expert_bias_rounded_with_the_gate": (
        reading(ROUTER, rounded_with("gate.weight")),
        ("router-is-float32",),
    ),
    "gate_rounded_with_the_expert_bias": (reading(ROUTER, rounded_with("expert_bias")), (MIXED,)),
    "taps_read_as_raw_bits": (reading(CONV, raw("conv.weight")), (UNIFORM, UNKNOWN, MIXED)),
    "norm_read_as_raw_bits": (reading(NORM, raw("weight")), (UNIFORM, UNKNOWN, MIXED)),
    "expert_bias_read_as_raw_bits": (reading(CHOICE, raw("expert_bias")), (UNKNOWN, MIXED)),
    "norm_of_known_types": (reading(NORM, known_types_of("weight")), (UNKNOWN, MIXED)),
    "biases_of_known_types": (reading(CONV, known_types_of("bias")), (UNKNOWN, MIXED)),
    "q_layernorm_of_known_types": (
        reading(ATTENTION, known_types_of("layernorm.weight")),
        (UNKNOWN, MIXED),
    ),
    "one_scale_for_all_rows": (reading(EXPERTS, scale_of_the_first_row), (UNKNOWN, MIXED)),
}
