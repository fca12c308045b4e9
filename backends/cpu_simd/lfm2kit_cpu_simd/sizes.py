"""Says from a spec how many bytes its block keeps, needs while it runs, and needs for a state.

Nothing here compiles a kernel, because `lfm2kit plan` asks before anything is built.
"""

from __future__ import annotations

from lfm2kit import specs
from lfm2kit.backend import DType, Room, Spec, Tensor, Weights
from lfm2kit.state import STEP_BACK
from lfm2kit.weights import STORED_AS
from lfm2kit_cpu_simd.machine import NR, STORAGES

FLOAT32 = 4  # bytes


def kept_bytes(spec: Spec, weights: Weights, dtype: DType | None) -> int:
    """Return the bytes of the packed matrices, without the padding of panels, and of the arrays.

    Matrices are rounded to `dtype`, or stay as they are stored.
    """
    if isinstance(spec, specs.Embedding):
        return 0  # a view of the checkpoint
    return sum(_packed_bytes(name, weights[name], dtype) for name in spec.parameters())


def _packed_bytes(name: str, tensor: Tensor, dtype: DType | None) -> int:
    if tensor.data.ndim != 2:
        return FLOAT32 * tensor.data.size
    rounded = None if name == "gate.weight" else dtype  # no precision rounds a router
    storage = rounded or (tensor.dtype if tensor.dtype in STORAGES else "F32")
    return tensor.data.size * STORED_AS[storage].itemsize


def scratch_bytes(spec: Spec, tokens: int) -> int:
    """Return the bytes between the kernels of a block, in a call with `tokens` rows.

    Of an operator this is a call without a state: it needs room for all keys and values.
    """
    return FLOAT32 * tokens * max(map(_floats_per_row, specs.leaves(spec)))


def _floats_per_row(spec: Spec) -> int:
    match spec:
        case specs.ShortConv():
            return 4 * spec.hidden_size
        case specs.Attention():
            heads = 2 * spec.num_attention_heads + 4 * spec.num_key_value_heads
            return heads * spec.head_dim
        case specs.MLP():
            return spec.intermediate_size
        case specs.Scores():
            return spec.num_experts
        case specs.Experts():
            return spec.num_experts_per_tok * (2 * spec.hidden_size + spec.intermediate_size)
    return 0


def state_bytes(spec: Spec, room: Room) -> int:
    """Return the bytes of an operator's state."""
    if isinstance(spec, specs.ShortConv):
        window = spec.kernel_size - 1 + STEP_BACK
        return FLOAT32 * room.pages * window * spec.hidden_size
    assert isinstance(spec, specs.Attention)
    padded = -(-spec.head_dim // NR) * NR  # a value fills whole panels
    floats = spec.num_key_value_heads * (spec.head_dim + padded)
    return FLOAT32 * room.pages * room.page_tokens * floats
