"""How attention cuts long contexts into parts: what states keep for it, and what launches ask for.

Keys are cut at multiples of PART_KEYS from a sequence's first key on.  CTAs that share a row's
parts leave their sums in memory that belongs to the state, so that a step takes none of its own.
"""

from __future__ import annotations

from typing import NamedTuple

from lfm2kit import specs
from lfm2kit.backend import Batch, Room
from lfm2kit_cuda.constants import ATTENTION

PART_KEYS, CTAS_OF_SM, TILE = ATTENTION.PART_KEYS, ATTENTION.CTAS_OF_SM, 32
MOST_ROWS = 16  # of a sequence that go through its keys one by one; more share what they read
SPANS = (8, 4, 2, 1)  # tiles
RESERVED_BYTES = 1024  # of shared memory for each CTA
LEAST_KEPT = 2048  # sums of parts that a state has room for: a long sequence beside short ones

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """The constants of a compilation that depend on the chip and on the sizes of heads."""

    WHOLE_BYTES: int  # of shared memory
    PARTS_BYTES: int
    SPAN_TILES: int  # of a part that are in shared memory at once


def parts_shape(spec: specs.Attention, room: Room) -> Shape:
    """Return the shape of what a state has room for: the sums of parts, with maximum and total.

    A row has room for as many parts as its batch's table of pages is wide, which engines round up
    to a power of two; and they round the number of rows up, by less than half from 16 on.
    """
    parts = -(-3 * room.pages * room.page_tokens // PART_KEYS)
    kept = max(LEAST_KEPT, parts) if room.pages else 0
    return kept, spec.num_attention_heads, spec.head_dim + 2


def arrived_shape(spec: specs.Attention, room: Room) -> Shape:
    """Return the shape of the counters of CTAs that are done, for no more rows than parts."""
    return parts_shape(spec, room)[0], spec.num_key_value_heads


def parts_of(batch: Batch, page_tokens: int, kept: int) -> int:
    """Return the most parts that a row's CTAs sum, or 0 if a CTA takes all keys of several rows.

    It depends on the batch's form alone, because the grid of a captured step stays as it is.
    """
    parts = -(-batch.pages.shape[1] * page_tokens // PART_KEYS)
    if parts > 1:
        return parts if batch.max_seqlen <= MOST_ROWS and batch.tokens * parts <= kept else 0
    return parts if batch.max_seqlen == 1 else 0  # of one part nothing is kept


def ctas_of_row(batch: Batch, kv_heads: int, parts: int, sms: int) -> int:
    """Return how many CTAs share the parts of a row and key head: enough to fill the device."""
    return min(parts, -(-CTAS_OF_SM * sms // max(1, batch.tokens * kv_heads)))


def layout(spec: specs.Attention, itemsize: int, most_shared_bytes: int) -> Layout:
    """Return what kernels are compiled for: spans as shared memory has room for them."""
    group = spec.num_attention_heads // spec.num_key_value_heads
    piece = 16 if spec.head_dim * itemsize % 16 == 0 else 4
    tile = -(-TILE * (2 * spec.head_dim * itemsize + piece) // 16) * 16
    pairs, warps = max(1, ATTENTION.MOST_ROWS // group) * group, ATTENTION.ATTEND_THREADS // 32

    def shared(tiles: int, queries: int, weighed: int) -> int:
        """Return the bytes of tiles, queries, each warp's weights of some tiles, and a word."""
        weights = weighed * TILE * -(-queries // warps) * warps
        return tiles * tile + 4 * (queries * spec.head_dim + weights) + 64

    def is_roomy(span: int) -> bool:
        bytes_of_sm = most_shared_bytes + RESERVED_BYTES
        return CTAS_OF_SM * (shared(span, group, span) + RESERVED_BYTES) <= bytes_of_sm

    span = next(filter(is_roomy, SPANS), SPANS[-1])
    return Layout(shared(2, pairs, 1), shared(span, group, span), span)
