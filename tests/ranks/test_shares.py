"""What a plan says of each rank of a job is what the rank then holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

from lfm2kit import specs
from lfm2kit.building.byte_counts import size
from lfm2kit.building.loading import Setup, set_up
from lfm2kit.building.options import Options
from lfm2kit.building.plugins import Plugins
from lfm2kit.measuring.gathering import gathered_bytes
from lfm2kit.memory import HostMemory
from lfm2kit.ranks.groups import NO_ROOM
from lfm2kit.ranks.joining import fitting_alike
from lfm2kit.ranks.shares import distinct, shares
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.rewrites import Rewrite, owners_among, owners_by_layer
from lfm2kit.testing import ThreadTransport, run_ranks
from lfm2kit.transport import held_by
from tests.checkpoint.typed import Cli
from tests.random_model import RANDOM

OPTIONS = Options(backend="cpu_simd")


class Elsewhere(HostMemory):
    name = "elsewhere"


def planned(cli: Cli, *options: object) -> Any:
    """Return what `lfm2kit plan` reports as JSON."""
    return json.loads(cli("plan", *options, "--json", "-").out)


ALL_FIT, NONE_FIT, SMALLER_FIT = 10**9, 3_300_000, 4_600_000  # free bytes


@pytest.mark.parametrize("free", [ALL_FIT, NONE_FIT, SMALLER_FIT])
@pytest.mark.parametrize("nodes", [[0, 0, 1, 1], [0, 0, 0, 1], [0, 1, 2, 3]])
def test_every_rank_is_planned_as_it_is_in_a_job(
    nodes: list[int], free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HostMemory, "free_bytes", lambda self, ranks=1: free)

    def kept(setup: Setup) -> tuple[Any, ...]:
        needed = setup.sizes.needed(setup.placed, "host", 64)
        return setup.grouping, needed, setup.placed.spec

    def rank(transport: ThreadTransport) -> Any:
        setup = set_up(RANDOM, OPTIONS, transport=transport, tokens=64)
        return kept(fitting_alike(transport, setup))

    of_ranks = list(map(kept, shares(RANDOM, OPTIONS, nodes, 64)))
    assert of_ranks == run_ranks(4, rank, nodes=nodes)
    if free != SMALLER_FIT:
        assert len(of_ranks[0][0].groups) == (len(set(nodes)) if free == ALL_FIT else 1)


def test_ranks_that_hold_the_same_experts_are_set_up_once() -> None:
    """Most of many ranks hold no expert at all."""
    of_ranks = shares(RANDOM, OPTIONS, [0] * 300, 64)
    assert len(distinct(of_ranks)) == 16 + 1
    owners = owners_among(RANDOM.spec, 300)
    for rank, setup in enumerate(of_ranks):
        held = owners_by_layer(cast(specs.Model, setup.placed.spec))
        assert held == owners
        for i in owners:
            (experts,) = (
                leaf
                for leaf in specs.leaves(cast(specs.Model, setup.placed.spec).layers[i])
                if isinstance(leaf, specs.Experts)
            )
            assert experts.local_experts == held_by(rank, owners[i])


def test_each_rank_is_set_up_where_another_rewrite_may_tell_them_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = Plugins.rewrites

    def with_another(self: Plugins, *asked: Any) -> dict[str, Rewrite]:
        another = Rewrite("another", "", lambda model: model, is_automatic=True)
        return {**ours(self, *asked), "another": another}

    monkeypatch.setattr(Plugins, "rewrites", with_another)
    assert len(distinct(shares(RANDOM, OPTIONS, [0] * 20, 64))) == 20


def test_the_plan_shows_groups_experts_and_memory_of_each_rank(
    cli: Cli, random_folder: Path
) -> None:
    ranks = ("--ranks", 4, "--ranks-per-node", 2)
    plan = ("-m", random_folder, "-b", "cpu_simd", *ranks, "--context", 32)
    fields = planned(cli, *plan, "--rank", 3)
    assert fields["groups"] == [[0, 1], [2, 3]]
    first, second, third, fourth = fields["shares"]
    assert [share["rank"] for share in fields["shares"]] == [0, 1, 2, 3]
    assert [share["machine"] for share in fields["shares"]] == [0, 0, 1, 1]
    assert first["experts"] == {f"layers.{i}": list(range(8)) for i in range(2, 8)}
    assert (third["group"], third["experts"]) == ([2, 3], first["experts"])
    assert (
        second["experts"]
        == fourth["experts"]
        == {f"layers.{i}": list(range(8, 16)) for i in range(2, 8)}
    )
    assert fourth["memories"] == fields["totals"]
    assert fields["totals"]["host"]["state_bytes"] > 0
    shown = cli("plan", *plan).out
    assert "4 ranks, experts in groups of 2, with 2048 tokens at once each:" in shown
    rows = [line.split() for line in shown.splitlines()]
    assert [row[:5] for row in rows if row[4:5] == ["host"] and row[0].isdigit()] == [
        ["0", "0", "0-1", "0-7", "host"],
        ["1", "0", "0-1", "8-15", "host"],
        ["2", "1", "2-3", "0-7", "host"],
        ["3", "1", "2-3", "8-15", "host"],
    ]


def test_the_plan_shows_what_the_exchange_takes_where_there_is_one(cli: Cli) -> None:
    def exchange(*more: object) -> int:
        fields = planned(cli, "-b", "cpu_simd", *more)
        of_ranks = {share["memories"]["host"]["exchange_bytes"] for share in fields["shares"]}
        assert of_ranks == {fields["totals"]["host"]["exchange_bytes"]}
        return int(*of_ranks)

    assert exchange() == exchange("--ranks", 2, "--parallel", "dp") == 0
    assert 0 < exchange("--ranks", 2, "--tokens", 64) * 31 < exchange("--ranks", 2)  # of 2048
    said = cli("plan", "-b", "cpu_simd", "--ranks", 2).out
    assert "MB for the exchange with other ranks, " in said


def test_rank_0_has_the_logits_that_all_ranks_send(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def logits(*more: object) -> list[int]:
        shares = planned(cli, "-b", "reference", *more)["shares"]
        return [share["memories"].get("host", {}).get("logits_bytes") for share in shares]

    assert logits() == [0]
    of_samples = gathered_bytes(40, 2048)
    assert logits("--ranks", 3, "--samples", 40) == [of_samples, 0, 0]
    said = cli("plan", "-b", "reference", "--ranks", 2, "--samples", 40).out
    assert f", {size(of_samples)} for the logits that all ranks send" in said
    monkeypatch.setattr(ReferenceBackend, "memory", lambda self, spec: Elsewhere())
    assert logits("--ranks", 2, "--samples", 40, "--parallel", "dp") == [of_samples, None]


def test_a_process_alone_has_no_table_of_ranks(cli: Cli) -> None:
    assert "ranks" not in cli("plan", "-b", "reference").out


@pytest.mark.parametrize(
    ("options", "groups", "overlap"),
    [
        ("", [[0]], "off"),
        ("--ranks 4", [[0, 1, 2, 3]], "auto"),
        ("--ranks 4 --overlap on", [[0, 1, 2, 3]], "on"),
        ("--ranks 4 --parallel dp", [[0], [1], [2], [3]], "off"),
        ("--ranks 4 --ep-size 2", [[0, 1], [2, 3]], "auto"),
        ("--ranks 4 --ranks-per-node 1", [[0], [1], [2], [3]], "off"),
        ("--ranks 4 --ranks-per-node 1 --parallel ep", [[0, 1, 2, 3]], "auto"),
        ("--ranks 4 --ranks-per-node 3", [[0, 1, 2], [3]], "auto"),
    ],
)
def test_the_plan_knows_every_way_to_share_out_experts_and_whether_their_exchange_overlaps(
    cli: Cli, options: str, groups: list[list[int]], overlap: str
) -> None:
    fields = planned(cli, "-b", "reference", *options.split())
    assert (fields["groups"], fields["overlap"]) == (groups, overlap)


def test_the_plan_says_in_words_whether_exchange_and_computation_overlap(cli: Cli) -> None:
    said = cli("plan", "-b", "reference", "--ranks", 2).out
    assert "overlap of exchange and computation: auto" in said


def test_if_one_share_does_not_fit_all_ranks_share_the_experts(
    cli: Cli, random_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three ranks and one, the one would hold all experts."""
    monkeypatch.setattr(HostMemory, "free_bytes", lambda self, ranks=1: 4_600_000)
    plan = ("-m", random_folder, "-b", "cpu_simd", "--tokens", 1)
    fields = planned(cli, *plan, "--ranks", 4, "--ranks-per-node", 3)
    assert fields["groups"] == [[0, 1, 2, 3]]
    assert fields["shortage"] is None
    assert any(note.endswith(NO_ROOM) for note in fields["notes"])


def test_the_first_rank_whose_share_does_not_fit_is_named(
    cli: Cli, random_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 16 experts, the third of three ranks holds 6, the others 5."""
    plan = ("-m", random_folder, "-b", "cpu_simd", "--tokens", 1, "--ranks", 3)
    first, *_ = planned(cli, *plan)["shares"]
    host = first["memories"]["host"]
    enough = sum(host[f"{kind}_bytes"] for kind in ("kept", "scratch", "exchange"))
    monkeypatch.setattr(HostMemory, "free_bytes", lambda self, ranks=1: enough)
    said = [planned(cli, *plan, "--rank", rank)["shortage"] for rank in range(3)]
    assert said[0].startswith("rank 2: memory 'host' is too small")
    assert said == [said[0]] * 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks-per-node", 4], ["there is only one rank; give --ranks 4 or more"]),
        (["--ranks", 4, "--ranks-per-node", 5], ["there are 4 ranks; give --ranks 5 or more"]),
        (["--ranks", 4, "--ranks-per-node", 0], ["--ranks-per-node 0: expected a whole number"]),
        (["--ranks", 0], ["--ranks 0: expected a whole number"]),
        (["--rank", 1], ["--rank 1: there is only rank 0; give --ranks 2"]),
        (["--ranks", 4, "--rank", 4], ["--rank 4: ranks are 0 to 3; give --ranks 5"]),
    ],
)
def test_ranks_that_cannot_be_are_one_line(
    cli: Cli, arguments: list[object], words: list[str]
) -> None:
    cli("plan", "-b", "reference", *arguments).assert_fails(*words)
