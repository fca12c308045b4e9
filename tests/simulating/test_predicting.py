"""Predicted times are those that can be calculated by hand from the rates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lfm2kit.backend import BF16, F16, Format
from lfm2kit.building.curves import Curve
from lfm2kit.building.load import Load, unused
from lfm2kit.building.rank_rates import ExchangeKey, ExchangeRates
from lfm2kit.building.rates import Calibration, Call
from lfm2kit.errors import Lfm2kitError
from lfm2kit.simulating.comparing import EP_IN_NODE, ONE, Compared, Simulation, layouts
from lfm2kit.simulating.jobs import Job, Layout
from lfm2kit.simulating.model_rates import ModelRates, found
from lfm2kit.simulating.network import Link, network, past_host
from lfm2kit.simulating.predicting import Limit, Machine, Predicted, predict
from lfm2kit.simulating.request import Request, parsed
from lfm2kit.simulating.routing import drawn
from tests.random_model import RANDOM
from tests.simulating.rates import BLOCK, BLOCKS_MS, EXPERT, FAST, calibration

PATH = "rates.json"
VOCAB = 1024


def machine(request: Request, rates: Calibration, backend: str | None = None) -> Machine:
    of_model = ModelRates.of(RANDOM.spec, RANDOM.weights, found(rates, PATH, backend, "fp32"))
    assert rates.copies is not None
    return Machine(of_model, network(request, rates, PATH), rates.copies, request.overlap)


def compared(
    text: str, rates: Calibration, load: Load | None = None, backend: str | None = None
) -> list[Compared]:
    request = parsed(text)
    simulation = Simulation(RANDOM.spec, request, machine(request, rates, backend), load)
    return list(simulation.compared())


def predictions(text: str, rates: Calibration, load: Load | None = None) -> dict[str, Predicted]:
    (one,) = compared(text, rates, load)
    return {job.name: job.predicted for job in one.jobs}


def ms(predicted: Predicted) -> list[float]:
    return [1e3 * seconds for seconds in predicted.parts]


def test_one_rank_computes_all_blocks_and_all_experts() -> None:
    """With 256 tokens each of the 16 experts of 6 layers is used."""
    one = predictions("ranks=1,n=16", calibration())[ONE]
    assert ms(one) == pytest.approx([BLOCKS_MS + 6 * 16, 0, 0, 0, 0])
    assert one.seconds == pytest.approx(sum(one.parts))
    assert one.sent_bytes.tolist() == one.sent_messages.tolist() == [0]
    assert one.kept_bytes == BLOCKS_MS * BLOCK + 6 * 16 * EXPERT


def test_every_batch_is_a_forward() -> None:
    """Of samples of 2048 tokens, 2 make a batch."""
    one = predictions("ranks=1,n=5,tokens=2048", calibration())[ONE]
    assert ms(one)[0] == pytest.approx(3 * (BLOCKS_MS + 6 * 16))


@pytest.mark.parametrize(
    "text", ["ranks=1,n=16", "ranks=1/2/5,n=3/40,per-node=2", "ranks=1/2,n=5,tokens=2048"]
)
def test_as_much_work_is_told_as_was_announced(text: str) -> None:
    request, told = parsed(text), list[int]()
    near = (ExchangeRates(ExchangeKey(2, 1), FAST), ExchangeRates(ExchangeKey(2, 2), FAST))
    rates = calibration(exchanges=near)
    simulation = Simulation(RANDOM.spec, request, machine(request, rates), None)
    list(simulation.compared(told.append))
    assert sum(told) == simulation.work


def test_two_ranks_exchange_three_messages_a_layer_and_gather_one() -> None:
    both = predictions("ranks=2,n=32,link=1Tbit,latency=1ms", calibration())
    assert ms(both["dp"]) == pytest.approx([BLOCKS_MS + 6 * 16, 0, 0, 0, 1], rel=1e-3)
    assert ms(both["ep"]) == pytest.approx([BLOCKS_MS + 6 * 8, 0, 6 * 3, 0, 1], rel=1e-2, abs=1e-6)
    assert both["ep"].sent_messages.tolist() == [6 * 3, 6 * 3 + 1]
    assert both["dp"].sent_messages.tolist() == [0, 1]
    assert both["dp"].kept_bytes - both["ep"].kept_bytes == 6 * 8 * EXPERT


def test_tokens_between_devices_take_what_was_measured_there() -> None:
    """A layer's exchange is one time, with what is copied around it."""
    call, bytes_of_a_row = Curve((1,), (1e-6 / 2**10,)), 4 * 128
    rates = calibration(copies=1.0, exchanges=(ExchangeRates(ExchangeKey(2, 1), FAST),))
    of_a_kb = replace(machine(parsed("ranks=2,n=32"), rates), past_host=call)
    routing = drawn(RANDOM.spec, None, 32, 16)
    near, far = (
        Job.of(RANDOM.spec, Layout(at, layouts(at)["ep"], 128), 32) for at in ([0, 0], [0, 1])
    )
    predicted = predict(near, routing, of_a_kb, VOCAB)
    assert predicted.parts.copies == 0
    rows = 256 * (0.97 + 2)  # of a rank: its tokens, and the products of others'
    ms_of_layers = 1e-6 * rows * bytes_of_a_row / 2**10 * 1e3 * 6
    assert 1e3 * predicted.parts.exchange == pytest.approx(ms_of_layers, rel=0.1)
    with pytest.raises(Lfm2kitError, match="no exchange between machines"):
        predict(far, routing, of_a_kb, VOCAB)


def test_experts_of_a_call_share_what_does_not_depend_on_their_number() -> None:
    """A call of 4 took 4 ms, of which 2 would be the same for any number: 0.5 are an expert's."""
    (side,) = calibration().sides
    rates = calibration(sides=(replace(side, call=Call(4, 2e-3)),))
    one = predictions("ranks=1,n=16", rates)[ONE]
    assert ms(one)[0] == pytest.approx(BLOCKS_MS + 6 * (2 + 16 * 0.5))


def test_logits_are_copied_from_a_device_to_the_host() -> None:
    rates = calibration()
    for to_host, seconds in ((None, 0.0), (1e6, 16 * VOCAB * 4 / 1e6)):
        one = replace(machine(parsed("ranks=1,n=16"), rates), to_host=to_host)
        job = Job.of(RANDOM.spec, Layout([0], layouts([0])[ONE], 128), 16)
        predicted = predict(job, drawn(RANDOM.spec, None, 16, 16), one, VOCAB)
        assert predicted.parts.copies == pytest.approx(seconds)


@pytest.mark.parametrize("row_format", [BF16, F16], ids=str)
def test_rows_of_16_bits_are_sent_as_such_and_take_less_time(row_format: Format) -> None:
    text = "ranks=4,n=32,link=8Mbit,latency=1ns"
    wide, (side,) = calibration(FAST, FAST), calibration(FAST, FAST).sides
    narrow = replace(wide, sides=(replace(side, row_format=row_format),))
    before, after = (predictions(text, rates)["ep"] for rates in (wide, narrow))
    routing, layout = (
        drawn(RANDOM.spec, None, 32, 16),
        Layout(range(4), layouts(range(4))["ep"], 128),
    )
    counts = Job.of(RANDOM.spec, layout, 32).counts(routing)
    rows = [sum(layer.dispatch.rows for layer in rank.values()) for rank in counts]
    hidden_size = RANDOM.spec.embed_tokens.hidden_size
    saved = before.sent_bytes - after.sent_bytes
    assert saved.tolist() == [2 * hidden_size * sent for sent in rows]
    assert before.sent_messages.tolist() == after.sent_messages.tolist()
    assert after.parts.exchange < before.parts.exchange


def test_the_time_of_bytes_is_that_of_the_busiest_direction() -> None:
    request = parsed("ranks=2,n=7,link=8Mbit,latency=1ns")
    routing, layout = drawn(RANDOM.spec, None, 7, 16), Layout([0, 1], layouts([0, 1])["ep"], 256)
    job = Job.of(RANDOM.spec, layout, 7)
    seconds = 0.0
    (samples,) = job.forwards()
    for layer in job.traffic:
        sendings = job.sendings(routing, layer, samples)
        seconds += sum(nbytes.max() for nbytes in sendings.bytes()) / 1e6 + 4e-6
    predicted = predict(job, routing, machine(request, calibration(FAST, FAST)), VOCAB)
    assert predicted.parts.exchange == pytest.approx(seconds, rel=1e-4)
    assert predicted.parts.gather == pytest.approx(4 * 4 * VOCAB / 1e6, rel=1e-4)
    assert predicted.limit is Limit.LINKS


def test_the_bytes_of_a_prediction_are_those_of_the_counts() -> None:
    """Which `test_sendings` compares with those of real ranks."""
    routing = drawn(RANDOM.spec, None, 21, 16)
    for layout in layouts([0, 0, 1, 1]).values():
        job = Job.of(RANDOM.spec, Layout([0, 0, 1, 1], layout, 2), 21)
        predicted = predict(job, routing, machine(parsed("ranks=4,n=21"), free()), VOCAB)
        counts, gathered = job.counts(routing), job.gathered(VOCAB)
        for rank, gather in enumerate(gathered):
            legs = [
                leg
                for one in counts[rank].values()
                for leg in (one.counts, one.dispatch, one.combine)
            ]
            assert predicted.sent_bytes[rank] == sum(leg.bytes for leg in [*legs, gather])
            of_forwards = sum(leg.messages for leg in [*legs, gather])
            assert predicted.sent_messages[rank] == of_forwards


def free() -> Calibration:
    """Return rates by which everything is fast, on one machine and between several."""
    near = ExchangeRates(ExchangeKey(2, 1), FAST)
    return calibration(FAST, FAST, exchanges=(near, ExchangeRates(ExchangeKey(2, 2), FAST)))


def test_ranks_of_a_machine_share_its_link() -> None:
    def seconds(per_node: int) -> float:
        text = f"ranks=4,n=64,per-node={per_node},link=8Mbit,latency=1ns"
        near = (ExchangeRates(ExchangeKey(2, 1), FAST),)
        rates = calibration(FAST, FAST, exchanges=near)
        return predictions(text, rates)["ep"].parts.exchange

    assert 1.2 < seconds(2) / seconds(1) < 1.5  # 2 x 2 of 3 messages of a rank leave its machine


def test_what_was_measured_counts_for_the_messages_that_crossed_a_link() -> None:
    """Between 4 machines a rank had sent 3 messages; from 2 of 4 ranks 4 left a machine."""
    of_bytes = Curve((1,), (1e-6,))
    seconds = {}
    for ranks, machines, messages in ((2, 2, 1), (4, 4, 3), (4, 2, 4)):
        rates = calibration(exchanges=(ExchangeRates(ExchangeKey(ranks, machines), of_bytes),))
        # Nothing takes less than the smallest message did.
        seconds[messages] = predictions("ranks=2,n=32", rates)["ep"].parts.exchange
    assert seconds[1] / seconds[3] == pytest.approx(3, rel=1e-3)
    assert seconds[1] / seconds[4] == pytest.approx(4, rel=1e-3)


def test_a_group_waits_for_its_slowest_rank() -> None:
    """Rank 1 has the expert of all tokens, and computes a row for each in every layer."""
    counts = (0,) * 15 + (160,)
    layers = tuple(one._replace(counts=counts) for one in unused(RANDOM.spec))
    routing = drawn(RANDOM.spec, Load("tiny", 128, 160, layers), 10, 16)
    job = Job.of(RANDOM.spec, Layout([0, 0], layouts([0, 0])["ep"], 256), 10)
    a_row = Curve((1,), (1e-3,))
    near = ExchangeRates(ExchangeKey(2, 1), FAST)
    rates = calibration(FAST, a_row, exchanges=(near,))
    predicted = predict(job, routing, machine(parsed("ranks=2,n=10"), rates), VOCAB)
    assert predicted.seconds == pytest.approx(6 * 0.16, rel=1e-3)
    assert predicted.parts.compute == pytest.approx(6 * 0.08, rel=1e-3)
    assert predicted.parts.waiting == pytest.approx(6 * 0.08, rel=1e-3)
    assert predicted.rows_max_over_mean == 2


def test_overlap_hides_a_share_and_no_more_than_there_is_to_compute() -> None:
    def exchange(text: str) -> float:
        return predictions(f"ranks=2,n=32,link=1Tbit,{text}", calibration())["ep"].parts.exchange

    whole = exchange("latency=1ms")
    assert exchange("latency=1ms,overlap=0.5") == pytest.approx(whole / 2, rel=1e-3)
    assert exchange("latency=1ms,overlap=1") == pytest.approx(0, abs=1e-6)
    computed = 6 * (4 + 8) * 1e-3  # of the layers that have experts
    long = exchange("latency=100ms")
    assert exchange("latency=100ms,overlap=1") == pytest.approx(long - computed, rel=1e-3)


def test_rows_are_copied_around_an_exchange() -> None:
    near = ExchangeRates(ExchangeKey(2, 1), FAST)
    rates = calibration(copies=1e6, exchanges=(near,))
    both = predictions("ranks=2,n=32,per-node=2", rates)
    assert both["dp"].parts.copies == 0
    tokens = 256 * 6  # of a rank
    assert both["ep"].parts.copies == pytest.approx(
        tokens * (0.94 + 4 + 4 + 2) * 512 / 1e6, rel=0.02
    )
    assert both["ep"].limit is Limit.COPIES
    hidden = predictions("ranks=2,n=32,per-node=2,overlap=0.25", rates)["ep"].parts.copies
    assert hidden == pytest.approx(both["ep"].parts.copies - 6 * (4 + 8) * 1e-3, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "rates", "limit"),
    [
        ("ranks=2,n=32,link=1Tbit,latency=1ns", calibration(), Limit.WEIGHTS),
        (
            "ranks=2,n=32,link=1Tbit,latency=1ns",
            calibration(Curve((1,), (1e-3,)), Curve((1,), (1e-3,))),
            Limit.ARITHMETIC,
        ),
        ("ranks=2,n=32,link=1Tbit,latency=1s", calibration(), Limit.LATENCY),
        ("ranks=2,n=32,link=8kbit,latency=1ns", calibration(), Limit.LINKS),
    ],
)
def test_what_limits_is_named(text: str, rates: Calibration, limit: Limit) -> None:
    assert predictions(text, rates)["ep"].limit is limit


def test_on_one_machine_a_rank_copies_its_logits_to_where_rank_0_reads_them() -> None:
    """One rank has 3 of the 7 samples, and the other has 4."""
    near = calibration(copies=1e6, exchanges=(ExchangeRates(ExchangeKey(2, 1), FAST),))
    here = predictions("ranks=2,n=7,per-node=2", near)["dp"]
    assert here.parts.gather == pytest.approx(4 * VOCAB * 4 / 1e6)


def test_a_gather_can_be_what_limits() -> None:
    parts = predictions("ranks=2,n=32,link=8Mbit", free())
    assert parts["dp"].limit is Limit.GATHER


def test_layouts_are_the_different_ones() -> None:
    assert list(layouts([0])) == [ONE]
    assert list(layouts([0, 0])) == list(layouts([0, 1])) == ["dp", "ep"]
    found_ = layouts([0, 0, 1, 1])
    assert list(found_) == ["dp", "ep", EP_IN_NODE]
    assert found_[EP_IN_NODE].groups == ((0, 1), (2, 3))
    assert layouts([0, 0, 0, 0, 1, 1])[EP_IN_NODE].groups == ((0, 1, 2, 3), (4, 5))


def test_groups_of_a_size_that_is_asked_for_are_compared_where_ranks_can_form_them() -> None:
    in_pairs = layouts([0, 0, 0, 0], 2)
    assert list(in_pairs) == ["dp", "ep", "ep in groups of 2"]
    assert in_pairs["ep in groups of 2"].groups == ((0, 1), (2, 3))
    assert list(layouts([0, 0, 0], 2)) == list(layouts([0, 0], 2)) == ["dp", "ep"]


def test_an_exchange_between_devices_is_known_by_what_a_rank_sends_to_all_others() -> None:
    """Each of four ranks sends 10 bytes to every other rank, which is 30 bytes in all."""
    here = ExchangeRates(ExchangeKey(4, 1, "loom:0"), Curve((10, 20), (1e-3, 2e-3)))
    found_ = past_host(calibration(exchanges=(here,)), "loom:0", 2)
    assert found_ == Curve((30, 60), (1e-3, 2e-3))
    assert past_host(calibration(exchanges=(here,)), "host", 2) is None


def test_the_fastest_layout_that_fits_wins_and_the_reason_is_given() -> None:
    text = "ranks=2,n=32,link=1Tbit,latency=1ms"
    (one,) = compared(text, calibration())
    assert one.best is not None
    assert one.best.name == "ep"
    assert one.why() == "1.29x 'dp', which spends 48 ms more on computation"
    (slow,) = compared("ranks=2,n=32,link=1Tbit,latency=9ms", calibration())
    assert slow.best is not None
    assert slow.best.name == "dp"
    assert slow.why().endswith("'ep', which spends 162 ms more on the exchange")


def test_what_does_not_fit_does_not_win() -> None:
    of_ep = BLOCKS_MS * BLOCK + 6 * 8 * EXPERT
    text = f"ranks=2,n=32,link=1Tbit,latency=9ms,memory={of_ep}B"
    (one,) = compared(text, calibration())
    assert one.best is not None
    assert (one.best.name, one.why()) == ("ep", "the only layout that fits")
    (none,) = compared(text.replace(f"{of_ep}B", f"{of_ep - 1}B"), calibration())
    assert (none.best, none.why()) == (None, "no layout fits into the memory of a rank")


def test_by_a_load_experts_are_placed_as_in_a_run_unless_they_stay_in_order() -> None:
    counts = (400, 300, 200, 100, *[5] * 12)
    layers = tuple(one._replace(counts=counts) for one in unused(RANDOM.spec))
    load = Load("tiny", 128, 400, layers)
    rates = calibration(exchanges=(ExchangeRates(ExchangeKey(2, 1), FAST),))

    def uneven(more: str = "") -> float:
        text = f"ranks=2,n=64,per-node=2{more}"
        return predictions(text, rates, load)["ep"].rows_max_over_mean or 0.0

    assert 1 <= uneven() < 1.1
    assert uneven(",placement=order") > 1.8


def test_what_was_not_measured_is_one_line() -> None:
    rates = calibration()

    def said(text: str, rates: Calibration, backend: str | None = None) -> str:
        with pytest.raises(Lfm2kitError) as refused:
            compared(text, rates, backend=backend)
        return str(refused.value)

    assert "rates.json: there is no exchange between machines; give" in said("ranks=2,n=1", rates)
    near = said("ranks=4,n=1,per-node=4", rates)
    assert (
        "no exchange between ranks of one machine; measure with lfm2kit calibrate ranks=4" in near
    )
    assert "there are no rates of Embedding(" in said("ranks=1,n=1", rates, "weaver")
    assert "it has rates of loom in fp32" in said("ranks=1,n=1", rates, "weaver")
    no_experts = said("ranks=1,n=1", calibration(sides=()))
    assert "there are no rates of experts of 128 x 48 by loom in fp32" in no_experts
    assert "of no blocks in fp32; measure" in said("ranks=1,n=1", calibration(blocks=()))
    other = rates.blocks[0].key._replace(backend="weaver")
    two = calibration(blocks=(*rates.blocks, type(rates.blocks[0])(other, 0, FAST)))
    assert "of blocks by loom and weaver in fp32; choose one by backend" in said("ranks=1,n=1", two)


def test_a_link_without_a_latency_has_the_one_that_was_measured() -> None:
    slow = Curve((4, 10**6), (5e-3, 6e-3))
    measured = calibration(exchanges=(ExchangeRates(ExchangeKey(2, 2), slow),))
    request = parsed("ranks=2,n=1,link=8Tbit")

    def seconds(rates: Calibration) -> float:
        one = np.array([1.0])
        return float(network(request, rates, PATH).between().seconds(one)[0])

    assert seconds(measured) == pytest.approx(5e-3)
    assert seconds(calibration()) == pytest.approx(20e-6)


def test_the_messages_of_an_exchange_are_under_way_together() -> None:
    taken = Link.of(1e-3, 1e6).seconds(np.array([0.0, 1e6, 4e6]))
    assert taken == pytest.approx([0, 1.001, 4.001])
