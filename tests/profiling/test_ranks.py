"""A profile of several ranks: who waits for whom, on one time line."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from lfm2kit import specs
from lfm2kit.backend import API_VERSION, BackendPlugin, Block
from lfm2kit.batch import Batch
from lfm2kit.building.loading import set_up
from lfm2kit.building.options import Options
from lfm2kit.building.plugins import InstalledBackend, installed_plugins
from lfm2kit.building.results import Checked
from lfm2kit.building.waits import Waits
from lfm2kit.cli.profiling import Asked, Found, Prepared, measured
from lfm2kit.cli.report import Report
from lfm2kit.errors import Lfm2kitError
from lfm2kit.measuring.bench import random_batch
from lfm2kit.profiling import forwards
from lfm2kit.profiling.clocks import Ahead, clocks_of
from lfm2kit.profiling.figures import parts_of, totals
from lfm2kit.profiling.forwards import Job, Profile, Prompt, profiled
from lfm2kit.profiling.loads import expert_loads
from lfm2kit.profiling.marks import Span, What
from lfm2kit.profiling.page.heat import heat
from lfm2kit.profiling.page.timeline import timeline
from lfm2kit.profiling.ranks import OfRank, gathered, of_an_average_rank
from lfm2kit.profiling.sending import OF_RANKS, waits_apart
from lfm2kit.profiling.trace_events import trace_events
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.specs import Spec
from lfm2kit.testing import ThreadTransport, run_ranks
from lfm2kit.weights import Weights
from tests.random_model import RANDOM

LONG = 0.04  # seconds
LAYERS = range(2, 8)  # with experts


class SlowExperts(ReferenceBackend):
    def build(self, spec: Spec, weights: Weights) -> Block:
        block = super().build(spec, weights)
        if not isinstance(spec, specs.Experts):
            return block

        def slow(*inputs: Any) -> Any:
            time.sleep(LONG)
            return block(*inputs)

        return slow


def with_slow_experts(transport: ThreadTransport) -> list[OfRank]:
    """Return the profiles of a job whose rank 1 has slow experts."""
    return profiles(transport, SlowExperts() if transport.world.rank == 1 else ReferenceBackend())


def profiles(
    transport: ThreadTransport, backend: ReferenceBackend, overlap: str = "off"
) -> list[OfRank]:
    plugins = installed_plugins()
    mine = BackendPlugin("mine", "a test's", lambda context: backend, API_VERSION)
    plugins.backends["mine"] = InstalledBackend(mine, "this test")
    options = Options(backend="mine", overlap=overlap)
    setup = set_up(RANDOM, options, plugins=plugins, transport=transport)
    checked, waits = list[Checked](), list[Waits]()
    model = setup.build(checked=checked, waits=waits)
    batch = random_batch(1, 4, 1024, seed=transport.world.rank)
    job = Job(transport, setup.among)
    watched = [*checked, *waits]
    profile = profiled(model, watched, Prompt(batch), repetitions=1, job=job)
    parts = parts_of(setup, profile, batch)
    return gathered(transport, profile, parts, batch.sequences, None)


@pytest.fixture(scope="module")
def ranks() -> list[OfRank]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forwards, "MOST_OVERHEAD", np.inf)
        first, second = run_ranks(2, with_slow_experts)
    assert not second
    return first


def test_a_rank_waits_for_the_slow_experts_of_another_one(ranks: list[OfRank]) -> None:
    first, second = ranks
    assert (first.rank, second.rank) == (0, 1)
    experts = {total.kind: total.seconds for total in totals(second.parts, None)}["experts"]
    assert experts >= LONG * len(LAYERS)
    assert first.waits >= LONG  # much less than it is: a busy machine may be slow itself


def test_what_a_rank_does_and_waits_for_adds_up_to_the_forward(ranks: list[OfRank]) -> None:
    for one in ranks:
        assert one.blocks + one.exchange + one.waits + one.between == pytest.approx(one.seconds)
        kinds = {part.name.rpartition(".")[2]: part.kind for part in one.parts if not part.backend}
        assert kinds == {"exchange": "exchange", "sending": "sending", "wait": "wait for ranks"}


def test_an_average_rank_has_the_mean_of_all(ranks: list[OfRank]) -> None:
    parts = of_an_average_rank(ranks)
    whole = sum(part.seconds for one in ranks for part in one.parts)
    assert sum(part.seconds for part in parts) == pytest.approx(whole / 2)
    assert [part.name for part in parts] == [part.name for part in ranks[0].parts]


def test_the_ranks_have_one_time_line(ranks: list[OfRank]) -> None:
    assert all(span.begin >= 0 for one in ranks for span in one.spans)
    picture = timeline(ranks)
    assert {row[1] for row in picture.rows} == {"rank 0, host", "rank 1, host"}
    assert "the clock of one machine" in picture.about
    events = trace_events(ranks)["traceEvents"]
    assert {event["pid"] for event in events} == {1, 2}


def test_spans_are_shown_by_the_clock_of_rank_0() -> None:
    clocks, begins = [Ahead(), Ahead(5.0, 0.1)], [100.0, 107.0]

    def rank(transport: ThreadTransport) -> list[OfRank]:
        span = Span(What("head"), "host", 1.0, 1.0, 1.0)
        seconds = {"plain": [4.0], "marked": [4.0], "own": [3.0]}
        begin = begins[transport.world.rank]
        profile = Profile(**seconds, timeline=[span], begin=begin, clocks=clocks)
        return gathered(transport, profile, [], 1, None)

    first, _ = run_ranks(2, rank)
    assert [one.spans[0].begin for one in first] == [1.0, 3.0]
    assert [(one.waits, one.between) for one in first] == [(1.0, 3.0)] * 2
    assert timeline(first).about.count("may be wrong by 100 ms") == 1


def test_pieces_that_overlap_are_told_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwards, "MOST_OVERHEAD", np.inf)

    def rank(transport: ThreadTransport) -> list[OfRank]:
        return profiles(transport, ReferenceBackend(), overlap="on")

    first, _ = run_ranks(2, rank)
    assert all(one.exchange > 0 for one in first)
    assert any(one.waits > 0 for one in first)


def test_a_step_is_measured_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank has its share of the sequences, and a state for them."""
    monkeypatch.setattr(forwards, "MOST_OVERHEAD", np.inf)
    asked = Asked(n=3, seq_len=4, decode=True, repetitions=1, errors=False)

    def rank(transport: ThreadTransport) -> Found | None:
        setup = set_up(RANDOM, Options(backend="reference"), transport=transport)
        return measured(Prepared(Report(None, "a test"), asked, setup), transport)

    found, nothing = run_ranks(2, rank)
    assert found is not None
    assert nothing is None
    assert found.test == "a step of 3 sequences after 4 tokens on 2 ranks"
    assert [one.samples for one in found.ranks] == [1, 2]


def test_whoever_comes_last_waits_for_nobody() -> None:
    def rank(transport: ThreadTransport) -> list[list[Span]]:
        late = transport.world.rank * 2.0
        wait = Span(What("moe", kind=OF_RANKS), "host", 1 + late, 3 - late, 3 - late)
        return waits_apart([[wait], [wait]], transport)

    first, last = run_ranks(2, rank)
    assert [(s.name, s.begin, s.seconds) for s in first[1]] == [
        ("moe.wait", 1.0, 2.0), ("moe.sending", 3.0, 1.0),
    ]  # fmt: skip
    assert [(s.name, s.begin, s.seconds) for s in last[0]] == [
        ("moe.wait", 3.0, 0.0), ("moe.sending", 3.0, 1.0),
    ]  # fmt: skip


def test_ranks_that_tell_other_numbers_of_waits_are_refused() -> None:
    def rank(transport: ThreadTransport) -> object:
        wait = Span(What("moe", kind=OF_RANKS), "host", 0, 1, 1)
        return waits_apart([[wait] * (1 + transport.world.rank)], transport)

    with pytest.raises(Lfm2kitError, match="told 1, 2 waits on the ranks"):
        run_ranks(2, rank)


def test_the_clock_of_another_machine_is_found_within_the_error() -> None:
    ahead = {0: 0.0, 1: 0.0, 2: 5.0, 3: 5.0}

    def rank(transport: ThreadTransport) -> Any:
        mine = ahead[transport.world.rank]
        return clocks_of(transport, lambda: time.perf_counter() + mine)

    clocks, *others = run_ranks(4, rank, nodes=[0, 0, 1, 1])
    assert others == [clocks] * 3
    assert clocks[0] == clocks[1] == (0.0, 0.0)
    assert clocks[2] == clocks[3]
    assert abs(clocks[2].seconds - 5) <= clocks[2].error < 5


@pytest.mark.parametrize(("parallel", "owners"), [("ep", True), ("dp", False)])
def test_the_heat_map_says_which_rank_computed_how_much(parallel: str, owners: bool) -> None:
    batches = [Batch.of_sequences([[1, 2, 3]]), Batch.of_sequences([[4, 5, 6], [7, 8, 9]])]

    def rank(transport: ThreadTransport) -> Any:
        options = Options(backend="reference", parallel=parallel)
        setup = set_up(RANDOM, options, transport=transport)
        return expert_loads(setup, Prompt(batches[transport.world.rank]))

    loads, nothing = run_ranks(2, rank)
    assert not nothing
    assert list(loads.experts) == list(loads.ranks) == list(LAYERS)
    for layer in LAYERS:
        assert sum(loads.ranks[layer]) == sum(loads.experts[layer]) == 9 * 4
        if owners:
            computed = [0, 0]
            for tokens, owner in zip(loads.experts[layer], loads.owners[layer], strict=True):
                computed[owner] += tokens
            assert computed == loads.ranks[layer]
        else:
            assert list(loads.ranks[layer]) == [12, 24]
    picture = heat(loads)
    assert picture.svg.count('class="border"') == owners * len(LAYERS)
    assert picture.headings[2] == "of ranks"
