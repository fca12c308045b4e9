"""How operators' states lie in pages: the sizes that states, launches and figures share."""

from __future__ import annotations

from math import prod

from lfm2kit import specs
from lfm2kit.backend import STEP_BACK, Room
from lfm2kit.specs import Spec
from lfm2kit_cuda.parts import arrived_shape, parts_shape

Shape = tuple[int, ...]


def window(spec: specs.ShortConv) -> int:
    """Return how many rows of u a page keeps: for the next token, and for going back."""
    return spec.kernel_size - 1 + STEP_BACK


def rows_shape(spec: specs.ShortConv, room: Room) -> Shape:
    """Return the shape of the rows of u, float32, that a ShortConv's state keeps."""
    return room.pages, window(spec), spec.hidden_size


def keys_shape(spec: specs.Attention, room: Room) -> Shape:
    """Return the shape of the keys that an Attention's state keeps, and of the values."""
    return room.pages, room.page_tokens, spec.num_key_value_heads, spec.head_dim


def most_pages(tokens: int, page_tokens: int) -> int:
    """Return in how many pages a chunk of up to `tokens` tokens can lie, wherever it starts."""
    return -(-(tokens - 1) // page_tokens) + 1 if tokens else 0


def state_bytes(spec: Spec, room: Room, itemsize: int) -> int:
    """Return the bytes of an operator's or a layer's state, its keys of `itemsize` bytes each."""
    if isinstance(spec, specs.Layer):
        return state_bytes(spec.operator, room, itemsize)
    if isinstance(spec, specs.ShortConv):
        return 4 * prod(rows_shape(spec, room))
    assert isinstance(spec, specs.Attention)
    shared = prod(parts_shape(spec, room)) + prod(arrived_shape(spec, room))
    return 2 * itemsize * prod(keys_shape(spec, room)) + 4 * shared
