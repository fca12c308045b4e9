"""What is calculated from a routing is what the exchanges of real ranks count, to the byte."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from lfm2kit.backend import API_VERSION, BF16, F16, BackendPlugin, Format
from lfm2kit.building.load import Load, unused
from lfm2kit.building.loading import set_up
from lfm2kit.building.options import Options
from lfm2kit.building.plugins import InstalledBackend, Plugins
from lfm2kit.measuring.running import run_samples
from lfm2kit.ranks.balancing import owners_by
from lfm2kit.ranks.groups import Grouping
from lfm2kit.simulating.jobs import Job, Layout
from lfm2kit.simulating.routing import Routing, RoutingRecorder, drawn
from lfm2kit.testing import ThreadTransport, run_ranks
from tests.core.rounding import RoundingBackend
from tests.random_model import RANDOM

SEQ_LEN, SAMPLES = 3, 21
OPTIONS = Options(backend="reference", overlap="off")
INPUTS = np.random.default_rng(0).integers(
    0, RANDOM.spec.embed_tokens.vocab_size, (SAMPLES, SEQ_LEN), dtype=np.int32
)


@pytest.fixture(scope="module")
def routing() -> Routing:
    """Return the experts that the samples choose in one process."""
    recorder = RoutingRecorder()
    model = set_up(RANDOM, OPTIONS, rewrites=[recorder.rewrite()]).build()
    run_samples(model, INPUTS, 5)
    return recorder.routing(SEQ_LEN)


def groups_of(size: int, ranks: int) -> Grouping:
    starts = range(0, ranks, size)
    return Grouping(tuple(tuple(range(start, start + size)) for start in starts))


@pytest.mark.parametrize(
    ("ranks", "group", "batch"), [(2, 2, 64), (4, 4, 2), (8, 8, 64), (8, 4, 64), (16, 16, 1)]
)
def test_real_ranks_send_what_is_calculated(
    ranks: int, group: int, batch: int, routing: Routing
) -> None:
    """With 16 ranks and batches of 1, some ranks have no tokens in the second forward."""
    grouping = groups_of(group, ranks)

    def rank(transport: ThreadTransport) -> Any:
        model = set_up(RANDOM, OPTIONS, transport=transport, grouping=grouping).build()
        timed = run_samples(model, INPUTS, batch, transport=transport, groups=grouping.groups)
        return timed.exchanged

    counted = run_ranks(ranks, rank)[0].ranks
    job = Job.of(RANDOM.spec, Layout([0] * ranks, grouping, batch), SAMPLES)
    assert [told(counts) for counts in job.counts(routing)] == [of(one) for one in counted]
    sent = [asdict(sent) for sent in job.gathered(RANDOM.spec.embed_tokens.vocab_size)]
    assert sent == [one["gather"] | {"seconds": 0.0} for one in counted]


@pytest.mark.parametrize("row_format", [BF16, F16], ids=str)
def test_real_ranks_send_rows_of_16_bits_as_calculated(row_format: Format) -> None:
    """Their routing is recorded too: experts that round change what later layers choose."""
    backend, ranks, grouping = RoundingBackend(row_format), 3, groups_of(3, 3)
    plugins = Plugins([])
    plugin = BackendPlugin("rounding", "of this test", lambda _: backend, API_VERSION)
    plugins.backends["rounding"] = InstalledBackend(plugin, "tests")
    asked = replace(OPTIONS, backend="rounding")
    recorder = RoutingRecorder()
    model = set_up(RANDOM, asked, plugins=plugins, rewrites=[recorder.rewrite()]).build()
    run_samples(model, INPUTS, 5)

    def rank(transport: ThreadTransport) -> Any:
        there = set_up(
            RANDOM, asked, plugins=plugins, transport=transport, grouping=grouping
        ).build()
        return run_samples(there, INPUTS, 4, transport=transport, groups=grouping.groups).exchanged

    counted = run_ranks(ranks, rank)[0].ranks
    formats = dict.fromkeys(range(len(RANDOM.spec.layers)), row_format)
    layout = Layout([0] * ranks, grouping, 4)
    job = Job.of(RANDOM.spec, layout, SAMPLES, row_formats=formats)
    counts = job.counts(recorder.routing(SEQ_LEN))
    assert [told(one) for one in counts] == [of(one) for one in counted]


def of(rank: dict[str, Any]) -> dict[int, Any]:
    """Return what a rank told, by layer, without its seconds."""
    return {int(name.split(".")[1]): without_seconds(one) for name, one in rank["layers"].items()}


def told(counts: dict[int, Any]) -> dict[int, Any]:
    said = {i: asdict(one) | {"expert_rows": one.expert_rows.tolist()} for i, one in counts.items()}
    return {layer: without_seconds(one) for layer, one in said.items()}


def without_seconds(layer: dict[str, Any]) -> dict[str, Any]:
    sent = {name: layer[name] | {"seconds": 0.0} for name in ("counts", "dispatch", "combine")}
    return layer | sent


def test_replicas_are_computed_where_their_tokens_are() -> None:
    """What all ranks hold sends nothing: with everything on all ranks nothing is sent at all."""
    counts = tuple(range(1, 17))
    layers = tuple(one._replace(counts=counts) for one in unused(RANDOM.spec))
    load = Load("tiny", 128, 1000, layers)
    routing = drawn(RANDOM.spec, None, 8, 16)
    layout = Layout([0] * 4, groups_of(4, 4), 8)

    def rows(replicas: int) -> int:
        job = Job.of(RANDOM.spec, layout, 8, lambda size: owners_by(load, size, replicas))
        of_ranks = job.counts(routing)
        return sum(one.combine.rows for rank in of_ranks for one in rank.values())

    assert rows(0) > rows(4) > rows(16) == 0


def test_a_drawn_routing_has_the_shares_of_the_load_and_no_expert_twice() -> None:
    counts = (0, 1000, 900, 700, 500, 400, 200, 100, 100, 50, 50, 0, 0, 0, 0, 0)
    layers = tuple(one._replace(counts=counts) for one in unused(RANDOM.spec))
    routing = drawn(RANDOM.spec, Load("tiny", 128, 1000, layers), 256, 16)
    for ids in routing.layers.values():
        assert ids.shape == (4096, 4)
        assert all(len(set(row)) == 4 for row in ids.tolist())
        share = np.bincount(ids.ravel(), minlength=16) / 4096
        assert np.allclose(share, np.array(counts) / 1000, atol=0.03)
        assert share[1] == 1
        assert not share[[0, *range(11, 16)]].any()


def test_where_a_load_leaves_tokens_without_experts_so_does_the_routing() -> None:
    layers = tuple(one._replace(counts=(500, *[0] * 15)) for one in unused(RANDOM.spec))
    routing = drawn(RANDOM.spec, Load("tiny", 128, 1000, layers), 256, 16)
    for ids in routing.layers.values():
        assert (ids[:, 1:] == -1).all()
        assert 0.45 < np.mean(ids[:, 0] == 0) < 0.55
