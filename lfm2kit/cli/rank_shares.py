"""Shows what each rank of a planned job holds: its group, its experts and its memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Column

from lfm2kit import specs
from lfm2kit.building.byte_counts import size
from lfm2kit.building.loading import Setup
from lfm2kit.cli.console import show_table
from lfm2kit.ranks.shares import distinct
from lfm2kit.rewrites.ids_in_words import ranges

LEFT = ("rank", "machine", "group", "experts", "memory")
KINDS = ("kept", "scratch", "exchange", "logits", "state")


def fields_of(
    setups: Sequence[Setup], nodes: Sequence[int], totals: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return what each rank holds, by name, in order of rank; `totals` are their memories."""
    experts = {id(one): dict(_experts(one.placed.spec)) for one in distinct(setups)}
    return [
        {
            "rank": rank,
            "machine": nodes[rank],
            "group": setup.grouping.of(rank),
            "experts": experts[id(setup)],
            "memories": totals[rank],
        }
        for rank, setup in enumerate(setups)
    ]


def _experts(model: specs.Spec) -> Iterator[tuple[str, list[int]]]:
    """Yield the layers that have experts, each with those that this rank holds."""
    assert isinstance(model, specs.Model)
    for number, layer in enumerate(model.layers):
        # Not by type: those that are streamed are of another one.
        of_leaves = (getattr(leaf, "local_experts", None) for leaf in specs.leaves(layer))
        held = [ids for ids in of_leaves if ids is not None]
        if held:
            yield f"layers.{number}", sorted(e for ids in held for e in ids)


def show(shares: Sequence[Mapping[str, Any]]) -> None:
    """Print a row for each rank and memory."""
    in_words = cache(ranges)  # of a group, which may have thousands of ranks
    show_table(
        [row for share in shares for row in _rows(share, in_words)],
        *(Column(heading, overflow="fold") for heading in LEFT),
        *(Column(heading, justify="right", no_wrap=True) for heading in (*KINDS, "together")),
        box=SIMPLE_HEAD,
        pad_edge=False,
    )


def _rows(
    share: Mapping[str, Any], in_words: Callable[[tuple[int, ...]], str]
) -> Iterator[list[str]]:
    experts = _in_words(share["experts"].values())
    place = [str(share["rank"]), str(share["machine"]), in_words(share["group"]), experts]
    for memory, total in share["memories"].items():
        sizes = [total[f"{kind}_bytes"] for kind in KINDS]
        least = "at least " if total["unknown_blocks"] else ""
        yield [*place, memory, *map(size, sizes), f"{least}{size(sum(sizes))}"]


def _in_words(layers: Collection[list[int]]) -> str:
    """Return which experts of each layer a rank holds; how many, if these differ by layer."""
    held = {ranges(ids) or "none" for ids in layers}
    if len(held) < 2:
        return "".join(held)
    counts = sorted({len(ids) for ids in layers})
    return f"{' to '.join(map(str, dict.fromkeys([counts[0], counts[-1]])))} of each layer"
