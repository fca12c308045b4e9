"""The (token, k) pairs of a choice grouped by expert, alone or together with the choice."""

from __future__ import annotations

from typing import NamedTuple

import cupy

from lfm2kit import specs
from lfm2kit_cuda.blocks.router import Choice, Routing
from lfm2kit_cuda.constants import EXPERTS, GROUPING
from lfm2kit_cuda.kernels import load_kernel
from lfm2kit_cuda.products import Arithmetic, RowTiles, padded

GROUP_THREADS, ALIGNMENT = EXPERTS.GROUP_THREADS, EXPERTS.ALIGNMENT


class Groups(NamedTuple):
    tiles: RowTiles
    place: cupy.ndarray  # int32 [pairs]: the slot of each; -1 if its expert is not local


def are_grouped_at_once(spec: specs.SparseMoe, tokens: int) -> bool:
    """Return whether `chosen_and_grouped` takes this many tokens, if the choice is made here."""
    is_small = tokens <= GROUPING.MOST_TOKENS and spec.router.num_experts <= GROUPING.MOST_EXPERTS
    return is_small and tokens > 0 and len(spec.experts.local_experts) > 0


def chosen_and_grouped(
    choice: Choice, x: cupy.ndarray, sums: cupy.ndarray, local: cupy.ndarray, gemm: Arithmetic
) -> tuple[Routing, Groups]:
    """Return what `choice.by_sums` and then `grouped_by_expert` return, for few tokens.

    Rows of x that are zeros have the expert ids -1 instead: experts add +0 to them in any case.
    """
    s, tokens = choice.spec, sums.shape[1]
    experts, taken = s.num_experts, s.num_experts_per_tok
    routing, groups = choice.empty(tokens), _empty_groups(tokens * taken, local, gemm)
    load_kernel("blocks/grouping", "choose_and_group", EXPERTS=experts, TAKEN=taken)(
        (1,), 32 * GROUPING.MOST_TOKENS, x, x.shape[1], sums, choice.bias, *routing, tokens,
        s.norm_topk_prob, s.routed_scaling_factor, local, len(local), *_arguments(groups),
    )  # fmt: skip
    return routing, groups


def grouped_by_expert(
    expert_ids: cupy.ndarray, local: cupy.ndarray, experts: int, gemm: Arithmetic
) -> Groups:
    """Sort the (token, k) pairs by expert.

    `local` int32 are the ids of the experts that are here, of `experts` in all.
    """
    pairs, taken = expert_ids.size, expert_ids.shape[1]
    groups, shared_bytes = _empty_groups(pairs, local, gemm), 4 * (experts + len(local))
    kernel = load_kernel("blocks/experts", "group_by_expert", shared_bytes, VECTOR=4, TAKEN=taken)
    grid = (len(local) if pairs else 0,)
    kernel(grid, GROUP_THREADS, expert_ids, pairs, local, experts, *_arguments(groups))
    return groups


def _empty_groups(pairs: int, local: cupy.ndarray, gemm: Arithmetic) -> Groups:
    slots = padded(pairs + (ALIGNMENT - 1) * min(pairs, len(local)), ALIGNMENT)
    source, place = cupy.empty(slots, cupy.int32), cupy.empty(pairs, cupy.int32)
    tiling = gemm.tiling(pairs, len(local))
    tiles = cupy.empty((min(pairs, pairs // tiling.rows + len(local)), 4), cupy.int32)
    count = cupy.empty(1, cupy.int32)
    return Groups(RowTiles(slots, tiling, tiles, count, source), place)


def _arguments(groups: Groups) -> tuple[object, ...]:
    """Return the arguments of the kernels that fill groups."""
    tiles, place = groups
    return tiles.source, tiles.rows, place, tiles.tiles, tiles.count, *tiles.tiling
