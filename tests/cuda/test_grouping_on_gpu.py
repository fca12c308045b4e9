"""Few tokens are chosen and grouped in one kernel on a real GPU, with the bits of the two apart."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lfm2kit_cuda.constants import GROUPING, ROUTER
from lfm2kit_cuda.requirements import why_unavailable

from lfm2kit import specs
from lfm2kit.backend import Context
from lfm2kit.building.plugins import installed_plugins
from lfm2kit.testing.host_block import host_block
from lfm2kit.testing.random_inputs import random_inputs
from lfm2kit.testing.random_weights import random_weights
from lfm2kit.weights import Weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable())),
]

MOST = GROUPING.MOST_TOKENS
TILINGS = [(8, 8, False), (4, 1, False), (48, 8, True), (128, 128, False)]


def random_sums(rng: np.random.Generator, tokens: int, experts: int) -> Any:
    """Return sums of logits, of which some rows are all alike, have a NaN, or are saturated."""
    sums = rng.standard_normal((ROUTER.SPLITS, tokens, experts)).astype(np.float32) / 4
    kinds = rng.integers(0, 8, tokens)
    sums[:, kinds == 1] = 0
    sums[:, kinds == 2] = 100
    sums[3, kinds == 3, 0] = np.nan
    return sums


def assert_same(got: Any, want: Any) -> None:
    import cupy

    assert np.array_equal(cupy.asnumpy(got).view(np.int32), cupy.asnumpy(want).view(np.int32))


def check(choice: Any, sums: Any, local: Sequence[int], gemm: Any) -> None:
    """Compare the kernel for few tokens with the two that it stands for."""
    import cupy
    from lfm2kit_cuda.blocks.grouping import chosen_and_grouped, grouped_by_expert

    x = cupy.ones((sums.shape[1], 8), np.float32)
    sums, here = cupy.asarray(sums), cupy.asarray(np.array(local, np.int32))
    routing, groups = chosen_and_grouped(choice, x, sums, here, gemm)
    want = choice.by_sums(sums)
    wanted = grouped_by_expert(want[0], here, sums.shape[2], gemm)
    assert_same(routing[0], want[0])
    assert_same(routing[1], want[1])
    assert_same(groups.place, wanted.place)
    assert_same(groups.tiles.source, wanted.tiles.source)
    assert_same(groups.tiles.count, wanted.tiles.count)
    count = int(wanted.tiles.count[0])
    assert_same(groups.tiles.tiles[:count], wanted.tiles.tiles[:count])


@pytest.mark.parametrize("bias", [None, 0.0, 0.05, 1.0])
@pytest.mark.parametrize(
    ("experts", "taken"), [(5, 3), (32, 4), (33, 8), (64, 4), (GROUPING.MOST_EXPERTS, 8)]
)
def test_lists_and_weights_are_those_of_two_kernels(
    rng: np.random.Generator, experts: int, taken: int, bias: float | None
) -> None:
    from lfm2kit_cuda.blocks.router import Choice
    from lfm2kit_cuda.products import Tiling

    spec = specs.Choice(experts, taken, bias is not None, True, 1.5)
    biases = (bias or 0) * rng.standard_normal(experts, np.float32)
    gemm: Any = SimpleNamespace()
    choice = Choice(spec, Weights.of_arrays({"expert_bias": biases}), gemm)
    for tokens in range(1, MOST + 1):
        of = Tiling(*TILINGS[tokens % len(TILINGS)])
        gemm.tiling = lambda pairs, groups, of=of: of
        some = rng.permutation(experts)[: rng.integers(1, experts)]
        for local in (range(experts), some):
            check(choice, random_sums(rng, tokens, experts), local, gemm)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("local", [range(32), (31, 4, 0, 17, 8)], ids=["all", "some"])
def test_a_moe_has_the_bits_of_its_router_and_experts(
    rng: np.random.Generator, precision: str, local: Sequence[int]
) -> None:
    """On both sides of the most tokens that are chosen and grouped at once."""
    backend: Any = installed_plugins().creator(Context(precision=precision))("cuda")
    router = specs.Router(128, 32, 4, True, True, 1.0)
    moe = specs.SparseMoe(router, specs.Experts(128, 64, 32, 4, tuple(local)))
    weights = random_weights(moe, rng)
    whole, *parts = (host_block(backend, s, weights) for s in (moe, moe.router, moe.experts))
    for tokens in (0, 1, 2, 7, MOST - 1, MOST, MOST + 1):
        (x,) = random_inputs(moe, rng, tokens)
        want = parts[1](x, *parts[0](x))
        assert np.array_equal(whole(x).view(np.int32), want.view(np.int32)), tokens
