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
from lfm2kit.building.plugins import InstalledBackend, Plugins, installed_plugins
from lfm2kit.building.results import Checked
from lfm2kit.building.waits import Waits
from lfm2kit.cli.profiling import Asked, Found, Prepared, measured
from lfm2kit.cli.report import Report
from lfm2kit.errors import Lfm2kitError
from lfm2kit.exchange_round import Buffers
from lfm2kit.host_exchange import HostExchange
from lfm2kit.measuring.bench import random_batch
from lfm2kit.memory import HOST, Memory
from lfm2kit.profiling import forwards
from lfm2kit.profiling.clocks import Ahead, clocks_of
from lfm2kit.profiling.figures import Part, parts_of, totals
from lfm2kit.profiling.forwards import Job, Profile, Prompt, profiled
from lfm2kit.profiling.loads import expert_loads
from lfm2kit.profiling.marks import Span, What
from lfm2kit.profiling.page.heat import heat
from lfm2kit.profiling.page.strip import strip
from lfm2kit.profiling.page.timeline import timeline
from lfm2kit.profiling.ranks import ENDING, OfRank, gathered, of_an_average_rank
from lfm2kit.profiling.sending import OF_RANKS, waits_apart
from lfm2kit.profiling.trace_events import trace_events
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.specs import Spec, Work
from lfm2kit.testing import ThreadTransport, run_ranks
from lfm2kit.transport import ExchangeOffer
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


def plugins_with(backend: ReferenceBackend) -> Plugins:
    """Return what is installed, and this backend as "mine"."""
    plugins = installed_plugins()
    mine = BackendPlugin("mine", "a test's", lambda context: backend, API_VERSION)
    plugins.backends["mine"] = InstalledBackend(mine, "this test")
    return plugins


def profiles(
    transport: ThreadTransport, backend: ReferenceBackend, overlap: str = "off"
) -> list[OfRank]:
    options = Options(backend="mine", overlap=overlap)
    setup = set_up(RANDOM, options, plugins=plugins_with(backend), transport=transport)
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


def test_no_second_of_a_rank_counts_twice(ranks: list[OfRank]) -> None:
    """There is one forward with marks, in one memory: parts and spans are of the same one."""
    for one in ranks:
        begin = min(span.begin for span in one.spans)
        end = max(span.begin + span.seconds for span in one.spans)
        (after,) = (part.seconds for part in one.parts if part.name == ENDING.name)
        assert one.blocks + one.exchange + one.waits - after <= (end - begin) * (1 + 1e-9)
        assert one.blocks + one.exchange + one.waits >= LONG * len(LAYERS)
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


def test_waits_at_one_place_for_different_things_keep_their_kinds() -> None:
    """A crossing and an exchange may be at the same block."""
    experts, whats = "layers.2.feed_forward", ("wait for host", OF_RANKS)
    spans = [Span(What(experts, kind=kind), "gpu", i, 1.0, 1.0) for i, kind in enumerate(whats)]
    spans.append(Span(What(experts), "gpu", 2.0, 1.0, 1.0))
    parts = [Part(s.name, s.what.kind, "", "gpu", 1.0, Work(0, 0)) for s in spans[:2]]
    parts.append(Part(experts, "moe", "mine", "gpu", 1.0, Work(0, 0)))
    one = OfRank(0, 0, 1, 3.0, parts, spans, Ahead(), None)
    assert [row[2] for row in timeline([one]).rows] == [*whats, "moe"]
    events = [event for event in trace_events([one])["traceEvents"] if event["ph"] == "X"]
    assert [event["cat"] for event in events] == [*whats, "moe"]
    svg = strip(parts).svg
    assert f"{experts}.wait (wait for host): " in svg
    assert f"{experts} (moe, mine): " in svg


def test_experts_of_a_rank_work_for_the_tokens_of_its_group() -> None:
    """Two ranks have 1 and 3 tokens; each takes 4 of 16 experts, 8 of which are here, in bf16."""
    name = "layers.2.feed_forward.experts"
    profile = Profile(spans=[[Span(What(name), "host", 0.0, 1.0, 1.0)]])

    def rank(transport: ThreadTransport) -> list[Part]:
        setup = set_up(RANDOM, Options(backend="reference"), transport=transport)
        return parts_of(setup, profile, random_batch(1, 1 + 2 * transport.world.rank, 1024, seed=0))

    one, tokens = 3 * 128 * 48, 4
    read = 8 * (1 - 0.75**tokens)
    for (part,) in run_ranks(2, rank):
        assert part.work.flops == 2 * one * tokens * 4 / 2
        assert part.work.bytes == pytest.approx(2 * one * read + 8 * 128 * tokens / 2)


def test_pieces_that_overlap_are_told_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwards, "MOST_OVERHEAD", np.inf)

    def rank(transport: ThreadTransport) -> list[OfRank]:
        return profiles(transport, ReferenceBackend(), overlap="on")

    first, _ = run_ranks(2, rank)
    for one in first:
        assert {part.kind for part in one.parts} >= {"exchange", "sending", OF_RANKS}


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


class CountsRows(ReferenceBackend):
    """Notes how many rows its experts are given, call by call."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def build(self, spec: Spec, weights: Weights) -> Block:
        block = super().build(spec, weights)
        if not isinstance(spec, specs.Experts):
            return block

        def counting(x: Any, ids: Any, weights: Any) -> Any:
            self.rows.append(int(np.count_nonzero(ids >= 0)))
            return block(x, ids, weights)

        return counting


class Uncounted(ThreadTransport):
    """Has an exchange that counts nothing."""

    def exchange_in(self, memory: Memory) -> ExchangeOffer | None:
        class Exchange(HostExchange):
            counted = None  # type: ignore[assignment]

        return ExchangeOffer(HOST, lambda traffic: Exchange(self, traffic, buffers=Buffers()))


@pytest.mark.parametrize("make", [ThreadTransport, Uncounted])
def test_rows_are_those_that_experts_are_given(make: type[ThreadTransport]) -> None:
    """Ranks 0 and 1 share experts; rank 2 is alone on its machine, and computes its own rows."""

    def rank(transport: ThreadTransport) -> Any:
        backend, number = CountsRows(), transport.world.rank
        options, plugins = Options(backend="mine"), plugins_with(backend)
        setup = set_up(RANDOM, options, plugins=plugins, transport=transport)
        assert [len(group) for group in setup.grouping.groups] == [2, 1]
        loads = expert_loads(setup, Prompt(random_batch(1, 3 + number, 1024, seed=number)))
        return loads, backend.rows

    (loads, first), *others = run_ranks(3, rank, make=make, nodes=[0, 0, 1])
    came = zip(first, *(rows for _, rows in others), strict=True)
    assert loads.ranks == dict(zip(LAYERS, map(list, came), strict=True))
    assert first != others[0][1]
