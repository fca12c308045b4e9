"""What a run on ranks reports: what was sent, by the routing, and who waited, by the seconds."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import numpy as np
import pytest

from lfm2kit import progress
from lfm2kit.backend import Block, Spec
from lfm2kit.building.loading import set_up
from lfm2kit.building.options import Options
from lfm2kit.building.plugins import installed_plugins
from lfm2kit.measuring.exchanged import Exchanged
from lfm2kit.measuring.running import run_samples
from lfm2kit.progress import Progress
from lfm2kit.rewrites.experts_over_ranks import experts_over_ranks
from lfm2kit.testing import ThreadTransport, run_ranks
from lfm2kit.transport import evenly
from tests.core.small import build, small_spec
from tests.measuring.test_running import inputs_of
from tests.random_model import RANDOM

RANKS, SAMPLES, TOKENS = 3, 5, 6
K, HIDDEN = 2, 24


@pytest.fixture(autouse=True)
def own_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what a run allows its blocks from other tests."""
    monkeypatch.setattr(progress, "THIS_PROCESS", Progress())


def run(samples: int = SAMPLES, runs: int = 1, **changes: Any) -> Any:
    """Return what a run of batches of one sample reports, and each rank's ids by layer."""
    spec = small_spec(num_experts_per_tok=K, **changes)

    def rank(transport: ThreadTransport) -> Any:
        chosen = defaultdict(list)

        def wrap(name: str, spec: Spec, block: Block) -> Block:
            def called(*inputs: Any) -> Any:
                result = block(*inputs)
                chosen[name.removesuffix(".router")].append(result[0])
                return result

            return called if name.endswith(".router") else block

        model = build(spec, rewrites=[experts_over_ranks(transport.world, transport)], wrap=wrap)
        for _ in range(runs):
            chosen.clear()
            timed = run_samples(model, inputs_of(samples), 1, transport=transport)
        return timed, {name: np.concatenate(ids) for name, ids in chosen.items()}

    (first, *others), ids = zip(*run_ranks(RANKS, rank), strict=True)
    assert [one.exchanged for one in others] == [None] * (RANKS - 1)
    return first.exchanged, ids


@pytest.mark.parametrize(("samples", "runs"), [(SAMPLES, 1), (SAMPLES, 2), (1, 1)])
def test_what_is_reported_follows_from_the_routing(samples: int, runs: int) -> None:
    """One sample leaves two ranks without any; of two runs the first is a warm-up."""
    exchanged, ids = run(samples, runs, num_experts=7)
    document = json.loads(json.dumps(exchanged.document(1.0)))
    owners = np.array(evenly(RANKS, 7))
    assert [layer["layer"] for layer in document["layers"]] == list(ids[0])
    forwards = -(-samples // RANKS)
    for layer in document["layers"]:
        everyones = [owners[mine[layer["layer"]]] for mine in ids]
        to = [[len(set(row) - {r}) for row in mine] for r, mine in enumerate(everyones)]
        assert layer["dispatch"]["rows"] == [sum(rows) for rows in to]
        assert layer["dispatch"]["bytes"] == [sum(rows) * 4 * (HIDDEN + 2 * K) for rows in to]
        pairs = np.concatenate(everyones).ravel()
        at = np.bincount(pairs, minlength=RANKS)
        back = [n - np.count_nonzero(everyones[r] == r) for r, n in enumerate(at.tolist())]
        assert layer["combine"]["rows"] == back
        assert layer["combine"]["bytes"] == [rows * 4 * HIDDEN for rows in back]
        assert layer["counts"]["bytes"] == [forwards * 4 * (RANKS - 1)] * RANKS
        assert layer["rows_by_rank"] == at.tolist()
        by_expert = np.bincount(np.concatenate([m[layer["layer"]] for m in ids]).ravel(), None, 7)
        assert layer["rows_by_expert"] == by_expert.tolist()
        of_ranks = [np.where(owners == rank, by_expert, 0).tolist() for rank in range(RANKS)]
        assert layer["rows_by_rank_and_expert"] == of_ranks


def test_the_gather_of_logits_is_counted() -> None:
    """A batch of one sample is one message."""
    exchanged, _ = run()
    gather = exchanged.document(1.0)["gather"]
    vocab_size = small_spec().lm_head.vocab_size
    assert gather["messages"] == [0, 2, 2]
    assert gather["rows"] == [0, 2, 2]
    assert gather["bytes"] == [0, 8 * vocab_size, 8 * vocab_size]


def test_a_model_without_experts_sends_its_logits_alone() -> None:
    exchanged, _ = run(num_dense_layers=4)
    document = exchanged.document(1.0)
    assert (document["layers"], document["rows_max_over_mean"]) == ([], None)
    assert document["bytes"] == [0, 400, 400]
    assert exchanged.line(1.0) == "Ranks: 267 B sent by each on average"


def test_a_process_alone_reports_nothing() -> None:
    assert run_samples(build(small_spec()), inputs_of(1), 1).exchanged is None


def told(seconds: tuple[float, float, float], rows: int) -> dict[str, Any]:
    """Return what a rank tells of a run of one layer and one expert a rank."""
    sent = {"messages": 1, "rows": 2, "bytes": 10**6, "header_bytes": 0}
    names = zip(("counts", "dispatch", "combine"), seconds, strict=True)
    layer = {name: {**sent, "seconds": spent} for name, spent in names}
    layer |= {"copied_rows": 0, "expert_rows": [rows]}
    return {"layers": {"layers.2.feed_forward": layer}, "gather": {**sent, "seconds": 9.0}}


def test_a_rank_waited_as_long_as_it_spent_beyond_the_one_that_spent_least() -> None:
    ranks = [told((0.5, 0.1, 0.2), rows=30), told((0.1, 0.1, 0.8), rows=10)]
    exchanged = Exchanged(ranks, [[0, 1]])
    assert exchanged.waited() == pytest.approx([0.4, 0.6])
    assert exchanged.imbalance() == 1.5
    sent, even, share = exchanged.line(2.0).split(", ")
    assert sent == "Ranks: 4 MB sent by each on average"
    assert (even, share) == ("rows max/mean 1.50", "25% of the time waiting for others")


def test_a_rank_waits_for_those_of_its_group_alone() -> None:
    ranks = [told((0.0, spent, 0.0), rows=10) for spent in (0.1, 5.0, 0.3, 5.0)]
    exchanged = Exchanged(ranks, [[0, 2], [1, 3]])
    assert exchanged.waited() == pytest.approx([0, 0, 0.2, 0])


@pytest.mark.parametrize("nodes", [[0, 0, 1], [0, 1, 1]])
def test_a_rank_that_is_alone_in_its_group_has_zeros(nodes: list[int]) -> None:
    """Its group is that of a machine with one rank; rank 0 may be the one that is alone."""
    asked, plugins = Options(backend="reference"), installed_plugins()

    def rank(transport: ThreadTransport) -> Any:
        setup = set_up(RANDOM, asked, plugins=plugins, transport=transport)
        groups = setup.grouping.groups
        return run_samples(setup.build(), inputs_of(3), 1, transport=transport, groups=groups)

    exchanged = run_ranks(RANKS, rank, nodes=nodes)[0].exchanged
    document = exchanged.document(1.0)
    alone = 2 if nodes[1] == 0 else 0
    assert [layer["layer"] for layer in document["layers"]] == [
        f"layers.{i}.feed_forward" for i in range(2, 8)
    ]
    for layer in document["layers"]:
        assert layer["rows_by_rank"][alone] == layer["dispatch"]["bytes"][alone] == 0
        assert sum(layer["rows_by_rank"]) == 2 * 6 * 4
    assert document["waited_seconds"][alone] == 0
    assert 1 <= document["rows_max_over_mean"] < 2
    assert exchanged.line(1.0).count("max/mean") == 1
