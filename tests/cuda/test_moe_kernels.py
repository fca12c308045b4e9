"""Which kernels a sparse MoE launches, and that they get the arguments that their sources name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lfm2kit_cuda.compiling import SOURCES
from lfm2kit_cuda.constants import GROUPING

from lfm2kit import specs
from lfm2kit.testing.random_weights import random_weights
from tests.cuda import late_cupy

MOST = GROUPING.MOST_TOKENS
MOE = specs.SparseMoe(
    specs.Router(64, 8, 3, True, True, 1.0), specs.Experts(64, 32, 8, 3, (5, 0, 7))
)
WIDE = specs.SparseMoe(
    replace(MOE.router, num_experts=GROUPING.MOST_EXPERTS + 1),
    replace(MOE.experts, num_experts=GROUPING.MOST_EXPERTS + 1),
)
EMPTY = replace(MOE, experts=replace(MOE.experts, local_experts=()))
TOGETHER = ["logits", "choose_and_group", "combine_F32"]
APART = ["logits", "choose_by_sums", "group_by_expert", "combine_F32"]


def parameters(stem: str, name: str) -> str:
    """Return a letter for each parameter of a kernel: P for a pointer, f or i for a number."""
    source = (SOURCES / f"{stem}.cu").read_text()
    found = re.search(rf"\b{name.replace('_F32', '')}\(([^)]*)\)\s*{{", source)
    assert found is not None, name
    return "".join("P" if "*" in one else one.split()[0][0] for one in found[1].split(","))


def letter(argument: Any) -> str:
    return "i" if isinstance(argument, int) else "f" if isinstance(argument, float) else "P"


class Loaded(SimpleNamespace):
    """The modules, and the names of the kernels that were launched."""

    launched: list[str]
    feed_forward: Any
    products: Any

    def kernel(self, stem: str, name: str, *more: Any, **constants: Any) -> Any:
        def launch(grid: Any, threads: int, *arguments: Any) -> None:
            assert "".join(map(letter, arguments)) == parameters(stem, name)
            if 0 not in grid:
                self.launched.append(name)

        return launch


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loaded]:
    names = ("blocks.feed_forward", "blocks.grouping", "blocks.router", "products")
    with late_cupy.loaded(*names) as modules:
        there = Loaded(launched=[], feed_forward=modules[0], products=modules[3])
        for module in modules[:3]:
            monkeypatch.setattr(module, "load_kernel", there.kernel)
        yield there


class Gemm:
    """Products without kernels, with tiles of 8 rows."""

    def __init__(self, products: Any) -> None:
        self.products = products

    def pack_gated(self, gates: Any, ups: Any) -> None:
        return None

    def pack_down(self, matrices: Any) -> None:
        return None

    def tiling(self, pairs: int, groups: int) -> Any:
        return self.products.Tiling(8, 8)

    def rounded(self, x: Any) -> Any:
        return x

    def gated(self, x: Any, matrix: None, tiles: Any) -> Any:
        return late_cupy.empty((tiles.rows, 32), np.float32)

    def down(self, x: Any, matrix: None, tiles: Any) -> Any:
        return late_cupy.empty((tiles.rows, 64), np.float32)


def launched(loaded: Loaded, spec: specs.SparseMoe, tokens: int, choice: Any = None) -> list[str]:
    gemm: Any = Gemm(loaded.products)
    moe = loaded.feed_forward.SparseMoe(spec, random_weights(spec), gemm, choice)
    loaded.launched.clear()
    assert moe(late_cupy.empty((tokens, 64), np.float32)).shape == (tokens, 64)
    late_cupy.current_stream().synchronize()  # as long as there are the weights to be copied to
    return loaded.launched


@pytest.mark.parametrize(
    ("spec", "tokens", "kernels"),
    [
        (MOE, 1, TOGETHER),
        (MOE, MOST, TOGETHER),
        (MOE, MOST + 1, APART),
        (WIDE, 1, APART),
        (MOE, 0, []),
        (EMPTY, 1, ["logits", "choose_by_sums"]),
    ],
    ids=["one", "most", "more", "many experts", "none", "no local experts"],
)
def test_few_tokens_are_chosen_and_grouped_in_one_kernel(
    loaded: Loaded, spec: specs.SparseMoe, tokens: int, kernels: list[str]
) -> None:
    assert launched(loaded, spec, tokens) == kernels


def test_a_choice_that_lies_elsewhere_stays_there(loaded: Loaded) -> None:
    def choice(scores: Any) -> tuple[Any, Any]:
        loaded.launched.append("elsewhere")
        return late_cupy.empty((1, 3), np.int32), late_cupy.empty((1, 3), np.float32)

    kernels = ["logits", "score", "elsewhere", "group_by_expert", "combine_F32"]
    assert launched(loaded, MOE, 1, choice) == kernels


def test_a_product_asks_early_only_for_weights_of_tiles_that_an_older_kernel_listed(
    loaded: Loaded,
) -> None:
    products = loaded.products
    tiles = products.RowTiles(8, products.Tiling(8, 8), None, None, None)
    assert not products.are_known(tiles), "the kernel ahead may be the one that lists them"
    assert products.are_known(tiles.in_place())
    assert products.are_known(None), "the weights of a dense layer"
