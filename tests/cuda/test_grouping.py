"""The grouping of (token, k) pairs by expert on a real GPU, against a NumPy twin."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from lfm2kit_cuda.requirements import why_unavailable

Ints = npt.NDArray[np.int32]


def grouped(
    ids: Ints, local: Sequence[int], tile_rows: int, step: int, by_height: bool = False
) -> tuple[Ints, Ints, Ints]:
    """Return source, place and tiles as `group_by_expert` makes them, in eights for each expert.

    A pair of an id that is not local, -1 as well, has the place -1.
    """
    pairs = ids.reshape(-1)
    place = np.full_like(pairs, -1)
    rows = [int((pairs == e).sum()) for e in local]
    slots = [-(-its // 8) * 8 for its in rows]
    source = np.full(sum(slots), -1, np.int32)
    for e, its in enumerate(rows):
        of_expert = np.flatnonzero(pairs == local[e])
        place[of_expert] = sum(slots[:e]) + np.arange(its)
        source[place[of_expert]] = of_expert // ids.shape[1]
    of_kind: dict[int, list[tuple[int, int, int]]] = defaultdict(list)  # by height, in steps
    for e in sorted(range(len(local)), key=lambda e: (-rows[e], e)):
        begin = 0
        for steps in even(-(-rows[e] // step), -(-rows[e] // tile_rows)):
            many = min(steps * step, rows[e] - begin)
            of_kind[by_height and steps].append((e, sum(slots[:e]) + begin, many))
            begin += many
    tiles: list[tuple[int, int, int, int]] = []
    for _, kind in sorted(of_kind.items(), reverse=True):
        start, experts = len(tiles), [e for e, _, _ in kind]
        for e, first_slot, many in kind:
            siblings = (start + experts.index(e)) | experts.count(e) << 16
            tiles.append((e, first_slot, many, siblings))
    return source, place, np.array(tiles, np.int32).reshape(-1, 4)


def even(whole: int, parts: int) -> list[int]:
    """Return the sizes of the parts, the larger ones first."""
    return [whole // parts + (i < whole % parts) for i in range(parts)]


def random_ids(
    tokens: int, taken: int, local: Sequence[int], favourites: float, nobodys: float
) -> Ints:
    """Return different experts for each token, more often the first ones if asked.

    Of `nobodys` a half is -1, the rest any expert's.
    """
    rng = np.random.default_rng(tokens + len(local))
    scores = rng.random((tokens, len(local))) + favourites * np.linspace(1, 0, len(local))
    ids = np.array(local, np.int32)[np.argsort(-scores, axis=1)[:, :taken]]
    is_nobodys = rng.random(ids.shape)
    ids[is_nobodys < nobodys / 2] = -1
    others = (nobodys / 2 <= is_nobodys) & (is_nobodys < nobodys)
    ids[others] = rng.integers(0, 1 + max(local), others.sum())
    return ids


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 47, 48, 49, 96, 97, 128, 129, 1000])
@pytest.mark.parametrize(("tile_rows", "step"), [(48, 8), (128, 128), (128, 64), (6, 3)])
def test_tiles_cover_an_expert_evenly(rows: int, tile_rows: int, step: int) -> None:
    _, _, tiles = grouped(np.zeros((rows, 1), np.int32), range(1), tile_rows, step)
    sizes = tiles[:, 2]
    assert sizes.sum() == rows
    assert len(sizes) == -(-rows // tile_rows)
    assert all(0 < size <= tile_rows for size in sizes)
    assert all(size % step == 0 for size in sizes[:-1])
    assert sizes.max(initial=0) - (-(-sizes // step) * step).min(initial=tile_rows) <= step
    if step == tile_rows:
        assert all(size == tile_rows for size in sizes[:-1])


@pytest.mark.gpu
@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
@pytest.mark.parametrize(
    "tiling", [(48, 8, True), (128, 128, False), (64, 16, False), (64, 16, True)]
)
@pytest.mark.parametrize(
    ("tokens", "taken", "local", "favourites", "nobodys"),
    [
        (0, 4, range(32), 0.0, 0.0),
        (1, 4, range(32), 0.0, 0.0),
        (256, 4, range(32), 0.0, 0.0),
        (2048, 4, range(32), 0.0, 0.0),
        (2048, 4, range(32), 9.0, 0.1),  # most experts have no token
        (333, 1, range(8, 16), 0.5, 0.0),
        (333, 2, (31, 4, 0, 17), 0.5, 0.4),
        (100, 3, range(5, 33, 3), 0.5, 1.0),
        (4097, 8, range(256), 0.2, 0.0),
    ],
)
def test_grouping_on_the_device(
    tokens: int,
    taken: int,
    local: Sequence[int],
    favourites: float,
    nobodys: float,
    tiling: tuple[int, int, bool],
) -> None:
    import cupy
    from lfm2kit_cuda.blocks.grouping import grouped_by_expert
    from lfm2kit_cuda.products import Tiling

    ids = random_ids(tokens, taken, local, favourites, nobodys)
    gemm: Any = SimpleNamespace(tiling=lambda pairs, groups: Tiling(*tiling))
    here = cupy.asarray(np.array(local, np.int32))
    listed, place = grouped_by_expert(cupy.asarray(ids), here, 1 + max(local), gemm)
    source, expected_place, tiles = grouped(ids, local, *tiling)
    if tokens == 0:  # nothing is launched, and nothing read
        return
    got = cupy.asnumpy(listed.source)
    assert np.array_equal(got[: len(source)], source)
    assert (got[len(source) :] == -1).all()
    assert len(got) == listed.rows
    assert np.array_equal(cupy.asnumpy(place), expected_place)
    assert int(listed.count[0]) == len(tiles)
    assert np.array_equal(cupy.asnumpy(listed.tiles)[: len(tiles)], tiles)
