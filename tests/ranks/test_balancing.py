"""By a load, experts are on the ranks that make work even, and the logits keep their bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm2kit import progress
from lfm2kit.building.load import LayerLoad, Load
from lfm2kit.building.loading import Setup, set_up
from lfm2kit.building.options import Options
from lfm2kit.building.plugins import installed_plugins
from lfm2kit.checkpoint import Checkpoint, open_checkpoint
from lfm2kit.errors import Lfm2kitError
from lfm2kit.measuring.running import Timed, run_samples
from lfm2kit.memory import HostMemory
from lfm2kit.progress import Progress
from lfm2kit.ranks.balancing import balanced, expected_rows, max_over_mean, owners_by
from lfm2kit.rewrites.ids_in_words import ranges
from lfm2kit.rewrites.recorded_load import LoadRecorder
from lfm2kit.testing import ThreadTransport, run_ranks
from lfm2kit.transport import World, held_by
from tests.checkpoint.typed import Cli

RANKS, EXPERTS, K = 4, 32, 4
SEED, SAMPLES, TOKENS = 1, 32, 16  # a seed with which the router is uneven
SPEC = """
tie_word_embeddings = true
vocab_size = 64
hidden_size = 24
eps = 1e-05
[[layers]]
repeat = 3
operator = { type = "ShortConv", kernel_size = 3, bias = false }
feed_forward = { type = "SparseMoe", num_experts = 32, num_experts_per_tok = 4, \
use_expert_bias = true, norm_topk_prob = true, routed_scaling_factor = 1.0, \
intermediate_size = 8 }
"""


@pytest.fixture(autouse=True)
def own_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what a run allows its blocks from other tests."""
    monkeypatch.setattr(progress, "THIS_PROCESS", Progress())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("model") / "model.toml"
    path.write_text(SPEC)
    return open_checkpoint(path, [], seed=SEED)


def rows(load: Any, owners: Any) -> list[int]:
    return [round(one) for one in expected_rows(load, owners)]


def test_the_most_used_experts_are_shared_out_first() -> None:
    load = [1, 40, 30, 2, 20, 3]
    owners = balanced(load, 2)
    assert owners == ((1, 0, 1, 0, 1, 0),) * 2
    assert rows(load, owners) == [45, 51]
    assert max_over_mean([rows(load, owners)]) == 51 / 48


def test_no_rank_holds_more_experts_than_if_they_were_shared_out_evenly() -> None:
    owners = balanced([90, 1, 1, 1, 1], 2)
    assert [held_by(rank, owners) for rank in range(2)] == [(0, 4), (1, 2, 3)]
    for size in (1, 2, 3, 5, 8, 40):
        owners = balanced(range(EXPERTS), size)
        held = [len(held_by(rank, owners)) for rank in range(size)]
        assert sum(held) == EXPERTS
        assert max(held) == -(-EXPERTS // size)


def test_replicas_are_on_every_rank_which_computes_its_own_tokens() -> None:
    load = [1, 40, 30, 2, 20, 3]
    owners = balanced(load, 3, replicas=2)
    assert [ranks[1:3] for ranks in owners] == [(0, 0), (1, 1), (2, 2)]
    assert len({(ranks[0], *ranks[3:]) for ranks in owners}) == 1
    assert [held_by(rank, owners) for rank in range(3)] == [(1, 2, 4), (1, 2, 5), (0, 1, 2, 3)]
    assert rows(load, owners) == [43, 26, 26]


def test_all_experts_may_be_on_all_ranks_and_none_may_be_used() -> None:
    assert balanced([3, 2, 1], 2, replicas=3) == ((0, 0, 0), (1, 1, 1))
    assert max_over_mean([expected_rows([0, 0], balanced([0, 0], 2))]) is None


def test_a_load_of_layers_that_a_rewrite_has_changed_is_refused() -> None:
    owners_of = owners_by(Load("small", 24, 10, (LayerLoad(2, 1, (5, 5)),)), 2, 0)
    assert owners_of(2, 2) == ((0, 1), (0, 1))
    for layer, experts in ((3, 2), (2, 3)):
        with pytest.raises(Lfm2kitError, match="after the rewrites of the model; leave these out"):
            owners_of(layer, experts)


def test_an_expert_that_all_tokens_choose_needs_to_be_on_several_ranks() -> None:
    """On 8 ranks its rows are twice a rank's part of all rows of the 4 experts of a token."""
    load = [1000, *np.random.default_rng(0).multinomial(3000, np.ones(31) / 31).tolist()]
    alone, on_all = (balanced(load, 8, replicas) for replicas in (0, 4))
    busiest = [max_over_mean([expected_rows(load, owners)]) or 0 for owners in (alone, on_all)]
    assert busiest[0] > 2
    assert busiest[1] <= 1.10


def inputs() -> Any:
    return np.random.default_rng(0).integers(64, size=(SAMPLES, TOKENS), dtype=np.int32)


def run(model: Checkpoint, size: int, rewrites: Any = tuple, **options: Any) -> list[Timed]:
    """Return what each rank returns of a run with these options."""
    asked, plugins = Options(backend="reference", **options), installed_plugins()

    def rank(transport: ThreadTransport) -> Timed:
        setup = set_up(model, asked, transport=transport, plugins=plugins, rewrites=rewrites())
        return run_samples(setup.build(), inputs(), SAMPLES, transport=transport)

    return run_ranks(size, rank)


@pytest.fixture(scope="module")
def load(model: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of a load that one process has recorded."""
    recorder = LoadRecorder()
    setup = set_up(model, Options(backend="reference"), rewrites=[recorder.rewrite()])
    run_samples(setup.build(), inputs(), SAMPLES)
    path = tmp_path_factory.mktemp("load") / "load.json"
    found = recorder.load("model.toml", model.spec, None)
    assert found is not None
    path.write_text(json.dumps(found.document()))
    return path


def imbalance(results: list[Timed]) -> float:
    exchanged = results[0].exchanged
    assert exchanged is not None
    return exchanged.imbalance() or 0


@pytest.mark.parametrize("replicas", [0, K])
def test_of_an_uneven_router_every_rank_has_about_equal_rows(
    model: Checkpoint, load: Path, replicas: int
) -> None:
    before = run(model, RANKS)
    after = run(model, RANKS, load=load, replicate_experts=replicas)
    assert imbalance(before) >= 1.40
    assert imbalance(after) <= 1.10
    assert np.array_equal(before[0].logits, after[0].logits)


@pytest.mark.parametrize(
    ("size", "options"),
    [(2, {"replicate_experts": K}), (3, {"replicate_experts": 1}), (4, {"ep_size": 2}),
     (2, {"replicate_experts": EXPERTS}), (8, {"replicate_experts": K, "ep_size": 4})],
)  # fmt: skip
def test_wherever_experts_are_the_logits_have_one_processs_bits(
    model: Checkpoint, load: Path, size: int, options: Any
) -> None:
    alone = set_up(model, Options(backend="reference")).build()
    expected = run_samples(alone, inputs(), SAMPLES).logits
    assert np.array_equal(run(model, size, load=load, **options)[0].logits, expected)


def test_replicas_send_fewer_rows(model: Checkpoint, load: Path) -> None:
    def sent(replicas: int) -> int:
        exchanged = run(model, RANKS, load=load, replicate_experts=replicas)[0].exchanged
        assert exchanged is not None
        return sum(exchanged.document(1.0)["bytes"])

    few, none = sent(K), sent(EXPERTS)
    gathered = (SAMPLES - SAMPLES // RANKS) * 4 * 64
    counts = 4 * RANKS * (RANKS - 1) * 3  # of rows, in each of three layers
    assert none == gathered + counts
    assert sent(0) > few > none


def refused(model: Checkpoint, size: int, **options: Any) -> str:
    """Return why rank 0 of `size` cannot be set up with these options."""

    def attempt() -> None:
        set_up(model, Options(**options), world=World(0, size))

    with pytest.raises(Lfm2kitError) as caught:
        attempt()
    return str(caught.value)


def held(setup: Setup) -> list[int]:
    (experts,) = {
        tuple(leaf.spec.local_experts) for leaf in setup.placed.leaves()
        if leaf.name == "layers.1.feed_forward.experts"
    }  # fmt: skip
    return list(experts)


def test_memory_counts_replicas(model: Checkpoint, load: Path) -> None:
    def of(rank: int, replicas: int) -> Setup:
        asked = Options(backend="cpu_simd", load=load, replicate_experts=replicas)
        return set_up(model, asked, world=World(rank, RANKS))

    def kept(setup: Setup) -> int:
        return sum(
            setup.sizes.kept(leaf) or 0
            for leaf in setup.placed.leaves() if leaf.name.endswith(".experts")
        )  # fmt: skip

    everywhere = set.intersection(*(set(held(of(rank, K))) for rank in range(RANKS)))
    assert len(everywhere) == K
    for rank in range(RANKS):
        assert (len(held(of(rank, 0))), len(held(of(rank, K)))) == (8, 7 + K)
        assert 8 * kept(of(rank, K)) == (7 + K) * kept(of(rank, 0)) > 0


def test_where_replicas_do_not_fit_fewer_are_offered(
    model: Checkpoint, load: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(replicas: int) -> Setup:
        asked = Options(backend="cpu_simd", load=load, replicate_experts=replicas)
        return set_up(model, asked, world=World(0, RANKS))

    fitting = of(2)
    free = fitting.sizes.needed(fitting.placed, "host").kept
    monkeypatch.setattr(HostMemory, "free_bytes", lambda self, ranks=1: free)
    assert str(of(EXPERTS).shortage()).endswith("try replicate_experts=2")


@pytest.mark.parametrize(
    ("options", "size", "says"),
    [
        ({"replicate_experts": -1}, 4, "replicate_experts=-1: expected a whole number of 0 or"),
        (
            {"replicate_experts": 4, "load": None},
            4,
            "replicate_experts=4: needs a load, such as load='load.json'",
        ),
        (
            {"replicate_experts": 33},
            4,
            "replicate_experts=33: the model has 32 experts in a layer; try replicate_experts=32",
        ),
        ({"replicate_experts": 4}, 1, "replicate_experts=4: there is only one rank; start more"),
        (
            {"replicate_experts": 4, "parallel": "dp"},
            4,
            "replicate_experts=4: each rank holds all experts; try parallel='ep'",
        ),
        (
            {"replicate_experts": 4, "ep_size": 1},
            4,
            "replicate_experts=4: each rank holds all experts; try ep_size=4",
        ),
        (
            {"replicate_experts": 4, "gpu_memory": "1GB", "parallel": "dp"},
            4,
            "gpu_memory='1GB': the plan has no experts in a device's memory",
        ),
    ],
)
def test_replicas_that_cannot_be_are_one_sentence(
    model: Checkpoint, load: Path, options: Any, size: int, says: str
) -> None:
    asked = {"backend": "reference", "load": load, **options}
    assert refused(model, size, **asked).startswith(says)


def test_a_load_that_decides_nothing_or_is_of_another_model_is_refused(
    model: Checkpoint, load: Path, tmp_path: Path
) -> None:
    needs = "needs ranks that share experts, or a limit, such as gpu_memory='24GiB'"
    assert refused(model, 1, load=load).endswith(needs)
    assert refused(model, 4, load=load, parallel="dp").endswith(
        "each rank holds all experts; try parallel='ep'"
    )
    other = tmp_path / "other.json"
    other.write_text(json.dumps(json.loads(load.read_text()) | {"hidden_size": 25}))
    assert "of a model with hidden_size 25" in refused(model, 4, load=other)


def test_the_plan_shows_who_holds_what_and_how_even_that_is(
    cli: Cli, model: Checkpoint, load: Path
) -> None:
    plan = ("plan", "-m", model.path, "-b", "reference", "--ranks", RANKS)
    given = (*plan, "--load", load, "--replicate-experts", K)
    fields = json.loads(cli(*given, "--rank", 2, "--json", "-").out)
    expected = fields["expected"]
    assert expected["rows_max_over_mean_in_order"] == pytest.approx(imbalance(run(model, RANKS)))
    assert expected["rows_max_over_mean"] <= 1.10
    assert json.loads(cli(*plan, "--json", "-").out)["expected"] is None
    for layer in expected["layers"]:
        assert len(layer["on_all_ranks"]) == K
        assert sum(layer["rows_by_rank"]) == SAMPLES * TOKENS * 4
        for share, ids in zip(fields["shares"], layer["held_by_rank"], strict=True):
            assert share["experts"][layer["layer"]] == ids
    done = cli(*given)
    assert done.code == 0
    assert "by the load, rows max/mean 1.00 (without it 1.41); in each group:" in done.out
    first = expected["layers"][0]
    on_one = [ids for ids in first["held_by_rank"][3] if ids not in first["on_all_ranks"]]
    row = next(line for line in done.out.splitlines() if line.split()[:2] == ["layers.0", "1.00"])
    assert f" {ranges(first['on_all_ranks'])} " in row
    assert f"3: {ranges(on_one)} " in row
    assert "11 of each layer" in done.out


def test_replicas_that_cannot_be_are_one_line(cli: Cli, load: Path, tmp_path: Path) -> None:
    replicas = ("plan", "-b", "reference", "--ranks", 4, "--replicate-experts")
    cli(*replicas, -1).assert_fails("--replicate-experts -1: expected a whole number of 0 or more")
    cli(*replicas, 4).assert_fails("--replicate-experts 4: needs a load, such as --load load.json")
    cli(*replicas, 4, "--load", load).assert_fails(f"{load}: of a model with hidden_size 24")
    run = ("run", "-b", "reference", "--load", load, "--json", tmp_path / "a.json")
    cli(*run).assert_fails(f"{load}: of a model with hidden_size 24")
    assert not (tmp_path / "a.json").exists()
