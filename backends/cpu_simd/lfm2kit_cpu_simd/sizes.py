"""Says from a spec in which formats its block keeps weights, and how many bytes it needs.

Nothing here compiles a kernel, because `lfm2kit plan` asks before anything is built.
"""

from __future__ import annotations

from lfm2kit import specs
from lfm2kit.backend import F32, STEP_BACK, Format, Room, Spec, Tensor, Weights
from lfm2kit_cpu_simd.machine import NR, common_storage

FLOAT32 = 4  # bytes


def kept_formats(spec: Spec, weights: Weights, rounded_to: Format | None) -> dict[str, Format]:
    """Return the format in which a block keeps each of its weights.

    Matrices that are packed together stay in their common format, if kernels take it, or are
    rounded to `rounded_to`; the rest is F32.
    """
    shapes = spec.parameters()
    if isinstance(spec, specs.Embedding):
        return {name: weights[name].format for name in shapes}
    together: dict[str, list[Tensor]] = {}
    for name in (name for name, shape in shapes.items() if len(shape) == 2):
        together.setdefault(_packed_with(name), []).append(weights[name])
    packed = {
        word: common_storage(matrices)
        if rounded_to is None or word == "gate"  # no precision rounds a router
        else rounded_to
        for word, matrices in together.items()
    }
    return {name: packed.get(_packed_with(name), F32) for name in shapes}


def _packed_with(name: str) -> str:
    """Return the last word of a matrix's name, or of the matrix that it is packed with."""
    word = name.removesuffix(".weight").rpartition(".")[2]
    return {"k_proj": "q_proj", "v_proj": "q_proj", "w3": "w1"}.get(word, word)


def kept_bytes(spec: Spec, weights: Weights, rounded_to: Format | None) -> int:
    """Return the bytes of packed matrices, without the padding of panels, and of arrays."""
    if isinstance(spec, specs.Embedding):
        return 0  # a view of the checkpoint
    formats, shapes = kept_formats(spec, weights, rounded_to), spec.parameters()
    return sum(format.nbytes(shapes[name]) for name, format in formats.items())


def scratch_bytes(spec: Spec, tokens: int) -> int:
    """Return the bytes between the kernels of a block, in a call with `tokens` rows.

    An operator is called without a state here: it needs memory for all keys and values.
    """
    return FLOAT32 * tokens * max(map(_floats_per_row, (spec, *specs.leaves(spec))))


def _floats_per_row(spec: Spec) -> int:
    match spec:
        case specs.ShortConv():
            return 4 * spec.hidden_size
        case specs.Attention():
            heads = 2 * spec.num_attention_heads + 4 * spec.num_key_value_heads
            return heads * spec.head_dim
        case specs.MLP():
            return spec.intermediate_size
        case specs.Router():
            return spec.num_experts  # scores alone are a result
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
