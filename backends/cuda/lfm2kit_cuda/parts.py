"""How attention cuts long contexts into parts: what states keep for it, and what launches ask for.

Keys are cut at multiples of PART_KEYS from a sequence's first key on.  CTAs that share a row's
parts leave their sums in memory that belongs to the state, so that a step takes none of its own.
"""

from __future__ import annotations

from typing import NamedTuple

from lfm2kit import specs
from lfm2kit.backend import Batch, Room
from lfm2kit_cuda.constants import ATTENTION

PART_KEYS, TILE = ATTENTION.PART_KEYS, 32
MOST_ROWS = 16  # of a sequence that go through its keys one by one; more share what they read
LEAST_KEPT = 1024  # sums of parts that a state has room for: a long sequence beside short ones
CTAS_OF_SM = 2

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """The constants of a compilation that depend on the chip and on the sizes of heads."""

    WHOLE_BYTES: int  # of shared memory
    PARTS_BYTES: int
    PART_WARPS: int
    PART_STAGES: int


def parts_shape(spec: specs.Attention, room: Room) -> Shape:
    """Return the shape of what a state has room for: the sums of parts, with maximum and total."""
    parts = -(-room.pages * room.page_tokens // PART_KEYS)
    kept = max(LEAST_KEPT, parts) if room.pages else 0
    return kept, spec.num_attention_heads, spec.head_dim + 2


def arrived_shape(spec: specs.Attention, room: Room) -> Shape:
    """Return the shape of the counters of CTAs that are done, for no more rows than parts."""
    return parts_shape(spec, room)[0], spec.num_key_value_heads


def parts_of(batch: Batch, page_tokens: int, kept: int) -> int:
    """Return the most parts that a row's CTAs share, or 0 if a CTA takes all keys of its rows.

    It depends on the batch's form alone, because the grid of a captured step stays as it is.
    """
    parts = -(-batch.pages.shape[1] * page_tokens // PART_KEYS)
    is_shared = parts > 1 and batch.max_seqlen <= MOST_ROWS and batch.tokens * parts <= kept
    return parts if is_shared else 0


def ctas_of_row(batch: Batch, kv_heads: int, parts: int, sms: int) -> int:
    """Return how many CTAs share the parts of a row and key head: enough to fill the device."""
    return min(parts, -(-CTAS_OF_SM * sms // max(1, batch.tokens * kv_heads)))


def layout(spec: specs.Attention, itemsize: int, most_shared_bytes: int) -> Layout:
    """Return what kernels are compiled for: stages and warps as shared memory has room for them."""
    group = spec.num_attention_heads // spec.num_key_value_heads
    piece = 16 if spec.head_dim * itemsize % 16 == 0 else 4
    tile = -(-TILE * (2 * spec.head_dim * itemsize + piece) // 16) * 16
    pairs, whole_warps = (
        max(1, ATTENTION.MOST_ROWS // group) * group,
        ATTENTION.ATTEND_THREADS // 32,
    )

    def shared(stages: int, queries: int, warps: int, of_warp: int) -> int:
        """Return the bytes of stages, of queries, of the weights of a tile, and of a last word."""
        return stages * tile + 4 * (queries * spec.head_dim + warps * TILE * of_warp) + 64

    whole = shared(2, pairs, whole_warps, -(-pairs // whole_warps))
    choices = [(4, 3), (4, 2), (2, 2), (1, 2)]
    warps, stages = next(
        (c for c in choices if shared(c[0] * c[1], group, c[0], group) <= most_shared_bytes),
        choices[-1],
    )
    return Layout(whole, shared(warps * stages, group, warps, group), warps, stages)
