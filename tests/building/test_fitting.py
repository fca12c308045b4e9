"""Experts are placed so that the model takes no more of a device's memory than is allowed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm2kit import specs
from lfm2kit.backend import (
    FP32,
    FP32_GRADE,
    BackendPlugin,
    Batch,
    Ceilings,
    Context,
    Precision,
    Spec,
    Weights,
)
from lfm2kit.building import kept_rates
from lfm2kit.building.byte_counts import parse_bytes
from lfm2kit.building.curves import Curve
from lfm2kit.building.fitting import RESERVE, TOKENS
from lfm2kit.building.load import Load, unused
from lfm2kit.building.loading import Setup, load_model, set_up
from lfm2kit.building.options import Options
from lfm2kit.building.plugins import InstalledBackend, Plugins, installed_plugins
from lfm2kit.building.rates import Calibration, Link, Side
from lfm2kit.building.rates import Experts as Measured
from lfm2kit.checkpoint import Checkpoint
from lfm2kit.errors import Lfm2kitError
from lfm2kit.formats import BF16
from lfm2kit.memory import HostMemory
from lfm2kit.ranks.groups import Grouping
from lfm2kit.records.machine import described
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.rewrites import replaced
from lfm2kit.rewrites.experts_split import EXPERTS_PER_SLOT, SLOTS
from lfm2kit.rewrites.parted_experts import SplitExperts, StreamedExperts
from lfm2kit.testing import ThreadTransport, run_ranks
from lfm2kit.testing.random_weights import random_weights, stored_as
from lfm2kit.transport import World
from tests.checkpoint.typed import Cli
from tests.core.test_model import DeviceBackend
from tests.random_model import RANDOM, build_random
from tests.rewrites.split_memories import Adding, AddingBackend

MOES = [i for i, x in enumerate(RANDOM.spec.layers) if isinstance(x.feed_forward, specs.SparseMoe)]
EXPERTS: Any = RANDOM.spec.layers[MOES[0]].feed_forward.experts
STORED = str(RANDOM.weights[f"layers.{MOES[0]}.feed_forward.experts.0.w1.weight"].format)
ONE = 4 * EXPERTS.expert.weight_elements()
SCRATCH = 1000  # bytes a token
ROOM = SLOTS * EXPERTS_PER_SLOT * ONE  # of the slots


class Card(Adding):
    free = 1 << 40

    def free_bytes(self) -> int:
        return Card.free


class CardBackend(AddingBackend):
    def __init__(self) -> None:
        super().__init__()
        self.there = Card("elsewhere, a card")

    def kept_bytes(self, spec: Spec, weights: Weights) -> int:
        return 4 * spec.weight_elements()

    def scratch_bytes(self, spec: Spec, tokens: int) -> int:
        return SCRATCH * tokens


class NamedCard(CardBackend):
    def hardware(self) -> dict[str, str]:
        return {"device": "an abacus"}


class StreamingCard(CardBackend):
    def why_unsupported(self, spec: Spec) -> str | None:
        return None if isinstance(spec, StreamedExperts) else super().why_unsupported(spec)

    def build(self, spec: Spec, weights: Weights) -> Any:
        return super().build(spec.experts if isinstance(spec, StreamedExperts) else spec, weights)

    def kept_bytes(self, spec: Spec, weights: Weights) -> int:
        if isinstance(spec, StreamedExperts):
            return spec.slots * spec.experts_per_slot * ONE if spec.position == 0 else 0
        return super().kept_bytes(spec, weights)

    def pinned_bytes(self, spec: Spec, weights: Weights) -> int:
        return 4 * spec.weight_elements() if isinstance(spec, StreamedExperts) else 0


class Silent(DeviceBackend):
    """Gives no figures."""


def with_backends(precisions: Sequence[Precision] = (FP32,), **kinds: type[Any]) -> Plugins:
    """Return the installed plugins and these backends."""
    plugins = installed_plugins()
    for name, kind in kinds.items():
        plugin = BackendPlugin(
            name,
            "a device",
            lambda _, kind=kind: kind(),  # type: ignore[misc]
            1,
            preference=1,
            precisions=tuple(precisions),
        )
        plugins.backends[name] = InstalledBackend(plugin, "this test")
    return plugins


def setup(
    plan: str = "card",
    world: World | None = None,
    tokens: int = TOKENS,
    checkpoint: Checkpoint = RANDOM,
    grouping: Grouping | None = None,
    card: type[CardBackend] = CardBackend,
    streaming: type[StreamingCard] | None = None,
    **options: Any,
) -> Setup:
    plugins = with_backends(card=card, streaming=streaming or StreamingCard, silent=Silent)
    asked = Options(backend=plan, **options)
    return set_up(checkpoint, asked, plugins=plugins, world=world, tokens=tokens, grouping=grouping)


def limit(resident: int, more: int = 0, tokens: int = TOKENS) -> str:
    """Return a size that is just enough for that many experts of each layer."""
    whole = 4 * (RANDOM.spec.weight_elements() + RANDOM.spec.lm_head.weight_elements())
    away = len(MOES) * (len(EXPERTS.local_experts) - resident) * ONE
    return f"{int((whole - away + SCRATCH * tokens + more) / (1 - RESERVE)) + 2}B"


def splits(found: Setup) -> list[SplitExperts]:
    trees = found.placed.tree()
    return [one.spec for one in trees if isinstance(one.spec, SplitExperts)]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("24GiB", 24 << 30),
        ("20GB", 20 * 10**9),
        ("1.5 gib", 3 << 29),
        ("512MiB", 512 << 20),
        ("7kB", 7000),
        ("100B", 100),
        (" 2TB ", 2 * 10**12),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text",
    ["", "24", "24G", "GiB", "-1GB", "1e3GB", "24 giga", "0GB", "9" * 19 + "TB", "iB", "1iB"],
)
def test_what_is_no_size_is_one_sentence_before_anything_is_read(text: str) -> None:
    with pytest.raises(Lfm2kitError) as refused:
        Options(gpu_memory=text)
    assert str(refused.value) == (
        f"gpu_memory='{text}': expected a size such as 24GiB or 20GB, or 'free' for what is free"
    )


@pytest.mark.parametrize("size", ["1TB", "free"])
def test_what_fits_is_not_split(size: str) -> None:
    Card.free = 1 << 40
    assert splits(setup(gpu_memory=size)) == []
    assert str(setup(gpu_memory=size).plan) == "card"


@pytest.mark.parametrize("resident", [0, 1, 5])
def test_as_many_experts_stay_as_there_is_room_for(resident: int) -> None:
    """In every layer the same number, those with the lowest ids; the host has the rest."""
    found = setup(gpu_memory=limit(resident))
    ids = EXPERTS.local_experts
    assert {spec.resident for spec in splits(found)} == {ids[:resident]}
    assert {spec.host for spec in splits(found)} == {ids[resident:]}
    assert len(splits(found)) == len(MOES)
    hosts = {leaf.memory.name for leaf in found.placed.leaves() if leaf.name.endswith(".host")}
    assert hosts == {"host"}
    assert found.shortage(TOKENS) is None
    less = int(limit(resident)[:-1]) - 4
    fewer = setup(gpu_memory=f"{less}B")
    assert {spec.resident for spec in splits(fewer)} == {ids[: max(resident - 1, 0)]}


def test_what_is_free_is_the_limit_of_free_and_of_more() -> None:
    Card.free = int(limit(3)[:-1])
    try:
        for size in ("free", "1TB"):
            assert {spec.resident for spec in splits(setup(gpu_memory=size))} == {
                EXPERTS.local_experts[:3]
            }
    finally:
        Card.free = 1 << 40


def test_too_little_without_any_expert_says_what_is_missing() -> None:
    found = setup(gpu_memory="100kB")
    shortage = str(found.shortage())
    assert shortage.startswith("memory 'elsewhere, a card' is too small: the model needs ")
    assert "100 kB are free" in shortage


def test_streamed_experts_take_slots_and_the_host_has_the_rest() -> None:
    found = setup("streaming", gpu_memory=limit(3, more=ROOM), streamed_experts=2)
    ids = EXPERTS.local_experts
    assert {(s.resident, s.streamed, s.host) for s in splits(found)} == {
        (ids[:3], ids[3:5], ids[5:])
    }
    backends = {leaf.name: leaf.backend for leaf in found.placed.leaves()}
    assert backends[f"layers.{MOES[0]}.feed_forward.experts.streamed"] == "streaming"
    assert str(found.plan).startswith("streaming,host_experts=")


def test_no_more_is_pinned_than_half_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    def streaming(count: int) -> Setup:
        size = limit(0, more=ROOM)
        plan = "streaming,host_experts=reference"
        return setup(plan, gpu_memory=size, streamed_experts=count)

    def free(count: int) -> None:
        monkeypatch.setattr(HostMemory, "free_bytes", lambda self, ranks=1: count)

    pinned = 3 * len(MOES) * ONE
    monkeypatch.setattr(ReferenceBackend, "kept_bytes", lambda *arguments: 0)
    free(2 * pinned)
    assert streaming(3).shortage() is None
    free(2 * pinned - 1)
    refusal = str(streaming(3).shortage())
    assert refusal.startswith("memory 'host' is too small: what is streamed needs ")
    assert "(no more than half of it may be pinned)" in refusal
    assert "try " in refusal
    assert "streamed_experts=2" in refusal


def test_no_more_is_streamed_than_a_layer_has() -> None:
    """And so a shortage tries no numbers that no model has."""
    there = EXPERTS.num_experts
    assert splits(setup("streaming", gpu_memory=limit(3), streamed_experts=there))
    with pytest.raises(Lfm2kitError) as refused:
        setup("streaming", gpu_memory=limit(3), streamed_experts=there + 1)
    assert str(refused.value) == (
        f"streamed_experts={there + 1}: the model has {there} experts in a layer; "
        f"try streamed_experts={there}"
    )


@pytest.mark.parametrize(
    ("plan", "item", "layer"),
    [
        ("card", "card", MOES[0]),
        (f"streaming,{MOES[-1]}.moe=card", "card", MOES[-1]),
        ("streaming,streamed_experts=reference", "reference", MOES[0]),
    ],
)
@pytest.mark.parametrize("size", ["1TB", limit(3)])
def test_what_cannot_be_streamed_is_refused(plan: str, item: str, layer: int, size: str) -> None:
    """It would stay on the device, or go to the host, without a word."""
    with pytest.raises(Lfm2kitError) as refused:
        setup(plan, gpu_memory=size, streamed_experts=2)
    assert str(refused.value) == (
        f"streamed_experts=2: '{item}' does not stream the experts of layer {layer}; "
        "leave it out, or give a plan that streams them"
    )
    assert splits(setup("card", gpu_memory=limit(3), streamed_experts=0)), "that streams nothing"


def test_a_limit_that_is_too_low_is_what_the_user_is_told_to_change() -> None:
    Card.free = 1 << 40
    assert "try gpu_memory='free'" in str(setup(gpu_memory="1B").shortage())
    Card.free = 1
    assert "gpu_memory='free'" not in str(setup(gpu_memory="1B").shortage())
    Card.free = 1 << 40


def test_the_hosts_own_blocks_need_what_is_not_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    found = setup(
        "streaming,host_experts=reference",
        gpu_memory=limit(0, more=ROOM),
        streamed_experts=3,
    )
    pinned, kept = 3 * len(MOES) * ONE, 1 << 30
    monkeypatch.setattr(
        ReferenceBackend, "kept_bytes", lambda self, spec, weights: kept // len(MOES)
    )
    for free, is_short in ((pinned + kept, False), (pinned + kept - len(MOES) - 1, True)):
        monkeypatch.setattr(HostMemory, "free_bytes", lambda self, ranks=1, free=free: free)
        assert (found.shortage() is not None) == is_short


@pytest.mark.parametrize("option", [{"streamed_experts": 2}, {"rates": "a"}])
def test_what_says_how_to_fit_needs_a_size(option: Any) -> None:
    ((name, value),) = option.items()
    with pytest.raises(Lfm2kitError) as refused:
        set_up(RANDOM, Options(**option))
    asked = f"{name}={value!r}"
    assert str(refused.value) == f"{asked}: needs a limit, such as gpu_memory='24GiB'"


def test_a_user_may_say_who_computes_the_hosts_experts() -> None:
    first = MOES[0]
    plan = "card,host_experts=reference"
    assert str(setup(plan, gpu_memory=limit(2)).plan) == plan
    assert splits(setup(plan, gpu_memory="free")) == [], "nor need it apply"
    with pytest.raises(Lfm2kitError, match="host_experts=reference' fits no block"):
        setup(plan)
    found = setup(f"card,{first}.experts=reference", gpu_memory=limit(2))
    assert len(splits(found)) == len(MOES) - 1, "a layer whose experts are on the host stays whole"


def test_the_hosts_part_keeps_the_precision_that_the_plan_gives_the_experts() -> None:
    half = Precision("half", FP32_GRADE)
    plugins = with_backends((FP32, half), card=CardBackend, near=ReferenceBackend)
    options = Options(backend=f"card:half,{MOES[0]}.experts=card:fp32", gpu_memory=limit(2))
    found = set_up(RANDOM, options, plugins=plugins)
    items = [leaf.backend for leaf in found.placed.leaves() if leaf.name.endswith(".host")]
    first, *others = items
    assert first is not None
    assert first.endswith(":fp32")
    assert set(others) == {"near:half"}
    alone = with_backends((FP32, half), card=CardBackend)
    with pytest.raises(
        Lfm2kitError, match=r"^gpu_memory=.*: no backend that can run .* in half in"
    ):
        set_up(RANDOM, options, plugins=alone)


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ("reference", "the plan has no experts in a device's memory"),
        ("card,experts=reference", "the plan has no experts in a device's memory"),
        ("silent", "a backend in memory 'elsewhere' does not say how much"),
    ],
)
def test_what_cannot_be_fitted_is_an_error(plan: str, says: str) -> None:
    with pytest.raises(Lfm2kitError) as refused:
        setup(plan, gpu_memory="1GB")
    assert str(refused.value).startswith(f"gpu_memory='1GB': {says}")


def test_a_rank_splits_its_own_experts() -> None:
    found = setup(gpu_memory=limit(0), world=World(1, 2))
    own = EXPERTS.local_experts[len(EXPERTS.local_experts) // 2 :]
    for spec in splits(found):
        assert spec.resident + spec.host == own


def test_the_logits_are_those_of_the_whole_model() -> None:
    batch = Batch.of_sequences([[1, 2, 3], [4]])
    whole = build_random("reference").logits(batch)
    split = setup(gpu_memory=limit(2)).build().logits(batch)
    np.testing.assert_allclose(split, whole, rtol=0, atol=1e-4)


def link(path: Path) -> None:
    path.symlink_to(path.parent / "a")


def write_rates(
    path: Path,
    plan: str,
    host: float = 1e11,
    link: float = 1e10,
    ceilings: Any = None,
    device: str = "",
    **machine: str,
) -> Path:
    """Write rates by which the host does `host` operations, the link `link` bytes a second.

    They are this machine's, but for the names in `machine`.
    """
    one = 6 * EXPERTS.hidden_size * EXPERTS.intermediate_size

    def side(backend: str, flops: float, memory: str, way: Link | None) -> Side:
        key = Measured(backend, "fp32", EXPERTS.hidden_size, EXPERTS.intermediate_size, STORED)
        curve = Curve((1, 64, 128), tuple(max(64, rows) * one / flops for rows in (1, 64, 128)))
        hardware = {"device": device} if device and way else {}
        return Side(key, memory, ONE, curve, way, ceilings, hardware)

    sides = side("reference", host, "host", None), side(plan, 1e13, "card", Link(link, link))
    measured_on = described(Context()) | machine
    calibration = Calibration("2030-01-01T00:00:00+00:00", measured_on, "tiny", sides)
    path.write_text(json.dumps(calibration.document()))
    return path


def write_load(path: Path) -> Path:
    """Write a load in which all layers but the last choose experts with higher ids more often."""
    layers = []
    for one in unused(RANDOM.spec):
        counts = range(10, 10 + len(one.counts))
        layers.append(one._replace(counts=tuple(counts[:: -1 if one.layer == MOES[-1] else 1])))
    load = Load("tiny", RANDOM.spec.embed_tokens.hidden_size, 1000, tuple(layers))
    path.write_text(json.dumps(load.document()))
    return path


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return the file in which this machine's rates would be kept."""
    monkeypatch.setattr(kept_rates, "root_folder", lambda: tmp_path / "cache")
    path = kept_rates.kept_file(described(Context()))
    path.parent.mkdir(parents=True)
    return path


@pytest.fixture
def reference_is_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lfm2kit.building.loading.in_host_memory", lambda *_: "reference")


def fast(plan: str, tmp_path: Path, resident: int, tokens: int = TOKENS, **rates: Any) -> Setup:
    path = write_rates(tmp_path / "rates.json", plan, **rates)
    size = limit(resident, more=ROOM, tokens=tokens)
    return setup(plan, tokens=tokens, gpu_memory=size, rates=path)


@pytest.mark.usefixtures("reference_is_preferred")
@pytest.mark.parametrize(
    ("rates", "streams", "computes"),
    [
        ({"host": 1e13, "link": 1e5}, False, True),
        ({"host": 1e6, "link": 1e11}, True, False),
        ({"host": 1e10, "link": 3e8, "ceilings": Ceilings(1e12, 1e11)}, True, True),
    ],
    ids=["slow link", "slow host", "both"],
)
def test_rates_say_what_is_streamed_and_what_the_host_computes(
    rates: Any, streams: bool, computes: bool, tmp_path: Path
) -> None:
    tokens = 16  # fewer bytes than an expert: many would make the way to the host too long
    found = fast("streaming", tmp_path, 3, tokens, **rates)
    assert any(spec.streamed for spec in splits(found)) == streams
    assert any(spec.host for spec in splits(found)) == computes
    assert found.shortage(tokens) is None
    assert found.sharing is not None
    for spec in splits(found):
        all_ids = (*spec.resident, *spec.streamed, *spec.host)
        assert sorted(all_ids) == list(EXPERTS.local_experts)
    batch = Batch.of_sequences([[1, 2, 3], [4]])
    whole = build_random("reference").logits(batch)
    np.testing.assert_allclose(found.build().logits(batch), whole, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("reference_is_preferred")
def test_no_other_number_of_streamed_experts_is_predicted_to_be_faster(tmp_path: Path) -> None:
    found = fast("streaming", tmp_path, 3, link=3e8)
    assert found.sharing is not None
    for count in (0, 1, 3, 13):
        other = setup(
            "streaming",
            gpu_memory=limit(3, more=ROOM),
            rates=tmp_path / "rates.json",
            streamed_experts=count,
        )
        assert other.sharing is not None
        assert {len(spec.streamed) for spec in splits(other)} == {count}
        assert found.sharing.seconds <= 1.001 * other.sharing.seconds


@pytest.mark.usefixtures("reference_is_preferred")
def test_a_backend_that_does_not_stream_is_given_nothing_to_stream(tmp_path: Path) -> None:
    """The `Experts` inside would stay, and take the memory that is not there."""
    found = fast("card", tmp_path, 3, host=1e6, link=1e12)
    assert not any(spec.streamed for spec in splits(found))
    assert found.shortage(TOKENS) is None


@pytest.mark.usefixtures("reference_is_preferred")
@pytest.mark.parametrize("has_rates", [False, True])
def test_experts_that_are_used_most_stay(has_rates: bool, tmp_path: Path) -> None:
    load = write_load(tmp_path / "load.json")
    rates = write_rates(tmp_path / "rates.json", "card") if has_rates else None
    found = setup(gpu_memory=limit(4), load=load, rates=rates)
    *others, last = splits(found)
    ids = EXPERTS.local_experts
    for spec in others:
        assert sorted(spec.resident) == list(ids[len(ids) - len(spec.resident) :])
    assert sorted(last.resident) == list(ids[: len(last.resident)])
    assert sum(len(spec.resident) for spec in splits(found)) == 4 * len(MOES)


@pytest.mark.usefixtures("reference_is_preferred")
@pytest.mark.parametrize("has_rates", [False, True])
def test_of_a_ranks_experts_those_that_get_the_most_rows_there_stay(
    has_rates: bool, tmp_path: Path
) -> None:
    """The three used most are on both ranks, and each of these computes half of their rows."""
    load = write_load(tmp_path / "load.json")
    rates = write_rates(tmp_path / "rates.json", "card") if has_rates else None
    ids = EXPERTS.local_experts
    for rank in range(2):
        found = setup(
            gpu_memory=limit(4), load=load, rates=rates, replicate_experts=3, world=World(rank, 2)
        )
        assert all(len(spec.local_experts) in (3 + 6, 3 + 7) for spec in splits(found))
        for spec in splits(found)[:-1]:
            assert not {*spec.resident} & {*ids[-3:]}
            assert {*ids[-3:]} < {*spec.local_experts}
            own = sorted({*spec.local_experts} - {*ids[-3:]})
            assert sorted(spec.resident) == own[len(own) - len(spec.resident) :]


@pytest.mark.usefixtures("reference_is_preferred")
def test_a_load_places_experts_over_ranks_and_below_a_limit_at_once(tmp_path: Path) -> None:
    load, batch = write_load(tmp_path / "load.json"), Batch.of_sequences([[1, 2, 3], [4]])
    plugins = with_backends(card=CardBackend)
    asked = Options(backend="card", gpu_memory=limit(3), load=load, replicate_experts=3)

    def rank(transport: ThreadTransport) -> Any:
        found = set_up(RANDOM, asked, plugins=plugins, transport=transport)
        assert all(spec.host and spec.resident for spec in splits(found))
        return found.build().logits(batch)

    whole = build_random("reference").logits(batch)
    for logits in run_ranks(2, rank):
        np.testing.assert_allclose(logits, whole, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("reference_is_preferred")
def test_experts_are_predicted_for_the_tokens_of_the_ranks_that_share_them(tmp_path: Path) -> None:
    rates = write_rates(tmp_path / "rates.json", "card", host=1e6)

    def seconds(world: World, **options: Any) -> float:
        found = setup(gpu_memory=limit(0), rates=rates, world=world, **options)
        assert found.sharing is not None
        return found.sharing.seconds

    alone_of_two = seconds(World(0, 2))
    assert seconds(World(0, 4), ep_size=2) == alone_of_two


@pytest.mark.usefixtures("reference_is_preferred")
def test_files_that_do_not_fit_are_one_sentence(tmp_path: Path) -> None:
    rates, load = tmp_path / "rates.json", tmp_path / "load.json"
    write_rates(rates, "another")
    with pytest.raises(Lfm2kitError, match=f"{rates}: there are no rates of .* by card in fp32"):
        setup(gpu_memory=limit(3), rates=rates)
    for name, path in (("rates", rates), ("load", load)):
        path.write_text("{}")
        with pytest.raises(Lfm2kitError, match=str(path)):
            setup(gpu_memory=limit(3), **{name: path})


@pytest.mark.usefixtures("reference_is_preferred")
def test_rates_that_are_kept_for_this_machine_place_experts_and_the_notes_say_it(
    kept: Path,
) -> None:
    write_rates(kept, "streaming", link=3e8)
    size = limit(3, more=ROOM)
    named = setup("streaming", gpu_memory=size, rates=kept)
    found = setup("streaming", gpu_memory=size)
    assert splits(found) == splits(named)
    assert found.sharing == named.sharing
    assert f"experts are placed by the rates in {kept}" in list(found.notes())
    assert not [note for note in named.notes() if "placed" in note]
    assert not [note for note in setup(gpu_memory="1TB").notes() if "placed" in note]
    given = setup("streaming", gpu_memory=size, streamed_experts=1)
    assert {len(spec.streamed) for spec in splits(given)} == {1}
    assert given.sharing is not None


@pytest.mark.usefixtures("reference_is_preferred")
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: path.unlink(), "no rates are kept for this machine and these threads; meas"),
        (lambda path: path.write_text("{}"), "json: 'kind' is not there"),
        (lambda path: write_rates(path, "another"), "there are no rates of .* by card in fp32"),
        (
            lambda path: write_rates(path, "card", device="a loom"),
            "rates of a loom, but this is an abacus; measure with lfm2kit calibrate",
        ),
        (
            lambda path: write_rates(path, "card"),
            "rates of a device without a name, but this is an abacus; measure with",
        ),
        (lambda path: path.chmod(0o666), "can be written by others .* can name another folder"),
        (lambda path: path.parent.chmod(0o777), "rates' can be written by others"),
        (lambda path: path.rename(path.parent / "a") and link(path), "neither a file nor a folder"),
        (lambda path: path.unlink() or os.mkfifo(path), "neither a file nor a folder"),
    ],
)
def test_without_such_rates_the_simple_rule_holds_and_a_note_says_why(
    spoil: Any, says: str, kept: Path
) -> None:
    write_rates(kept, "card")
    spoil(kept)
    found = setup(card=NamedCard, gpu_memory=limit(3))
    assert found.sharing is None
    assert {spec.resident for spec in splits(found)} == {EXPERTS.local_experts[:3]}
    (note,) = (note for note in found.notes() if note.startswith("experts are placed without"))
    assert re.search(says, note)
    assert "\n" not in note


def test_load_model_warns_where_experts_are_placed_without_rates(
    random_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugins = with_backends(card=CardBackend)
    monkeypatch.setattr("lfm2kit.building.loading.installed_plugins", lambda: plugins)
    with pytest.warns(UserWarning, match="experts are placed without predicted times") as warned:
        load_model(random_folder, "card", gpu_memory=limit(3))
    assert [one.filename for one in warned] == [__file__]


def smaller(spec: Spec) -> Spec:
    is_other = isinstance(spec, specs.Experts)
    return replace(spec, intermediate_size=40) if is_other else spec


def last_layer(size: bool = False, names: Sequence[str] = ()) -> Checkpoint:
    """Return a checkpoint whose last layer has smaller experts, or these tensors as F32."""
    last = MOES[-1]
    layers = list(RANDOM.spec.layers)
    if size:
        layers[last] = replaced(layers[last], smaller)
    spec = replace(RANDOM.spec, layers=tuple(layers))
    wide = random_weights(spec)
    tensors = dict(stored_as(wide, BF16))
    tensors |= {name: wide[name] for name in (f"layers.{last}.{n}.weight" for n in names)}
    return Checkpoint(Path("mixed"), spec, Weights(tensors), None)


@pytest.mark.usefixtures("reference_is_preferred")
@pytest.mark.parametrize(
    ("options", "last"),
    [
        ({"checkpoint": last_layer(size=True)}, "128 x 40 experts stored in BF16, by"),
        (
            {"checkpoint": last_layer(names=["feed_forward.experts.15.w2"])},
            "128 x 48 experts stored in BF16 and F32, by",
        ),
        (
            {"plan": f"card,{MOES[-1]}.moe=streaming"},
            "128 x 48 experts stored in BF16, by streaming in fp32",
        ),
    ],
)
@pytest.mark.parametrize("streamed", [None, 0])
def test_rates_of_one_layer_do_not_stand_for_layers_that_are_not_like_it(
    options: Any, last: str, streamed: int | None, kept: Path
) -> None:
    """They are refused if they are named, and passed over with a note if they are kept."""
    write_rates(kept, "card")
    said = (
        f"{kept}: rates place experts that are alike in all layers, but layer {MOES[0]} has "
        "128 x 48 experts stored in BF16, by "
    )
    options |= {"gpu_memory": limit(3), "streamed_experts": streamed}
    with pytest.raises(Lfm2kitError) as refused:
        setup(rates=kept, **options)
    assert str(refused.value).startswith(said)
    assert f"and layer {MOES[-1]} has {last}" in str(refused.value)
    found = setup(**options)
    assert found.sharing is None
    assert len({len(spec.resident) for spec in splits(found)}) == 1
    (note,) = (note for note in found.notes() if "placed" in note)
    assert note == f"experts are placed without predicted times: {refused.value}"


@pytest.mark.usefixtures("reference_is_preferred")
def test_rates_that_were_measured_elsewhere_are_named_with_what_differs(tmp_path: Path) -> None:
    """They are used: a plan for another machine is a use of them."""
    rates = write_rates(tmp_path / "rates.json", "card", device="a loom", cores="77", cuda="9")
    cores = described(Context())["cores"]
    fitted = partial(setup, card=NamedCard, gpu_memory=limit(3), rates=rates)
    for options in ({}, {"streamed_experts": 0}):
        found = fitted(**options)
        assert found.sharing is not None
        (note,) = (note for note in found.notes() if str(rates) in note)
        assert note == (
            f"the rates in {rates} were not measured here: cores 77, here {cores}; "
            "cuda 9, here unknown; device a loom, here an abacus"
        )
    assert not [note for note in setup(gpu_memory="1TB", rates=rates).notes() if "rates" in note]
    write_rates(rates, "card", device="an abacus")
    assert not [note for note in fitted().notes() if "rates" in note]


@pytest.mark.usefixtures("reference_is_preferred")
def test_a_run_says_it_once_and_in_its_record(
    cli: Cli, random_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rates = write_rates(tmp_path / "rates.json", "card", processor="a slide rule")

    def limited(_: Any, options: Options, **others: Any) -> Setup:
        del others["rewrites"], others["transport"]
        return setup(gpu_memory=options.gpu_memory, rates=options.rates, **others)

    monkeypatch.setattr(import_module("lfm2kit.cli.preparing"), "set_up", limited)
    size = limit(3, tokens=16)
    run = ("run", "-m", random_folder, "--random-inputs", 16, "-n", 1, "--json", "-")
    done = cli(*run, "--gpu-memory", size, "--rates", rates)
    assert done.code == 0
    (note,) = json.loads(done.out)["notes"]
    assert "not measured here: processor a slide rule, here " in note
    assert done.err.count("not measured here") == 1


def test_what_is_kept_is_of_the_threads_and_ranks_that_compute() -> None:
    contexts = [Context(), Context(threads=2), Context(local_ranks=2)]
    assert len({kept_rates.kept_file(described(one)) for one in contexts}) == 3


def test_the_plan_says_what_is_predicted(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reference_is_preferred: None
) -> None:
    rates = write_rates(tmp_path / "rates.json", "streaming", host=1e6, link=1e9)
    monkeypatch.setattr(
        import_module("lfm2kit.ranks.shares"),
        "set_up",
        lambda _, options, plugins, **others: setup(
            "streaming", gpu_memory=options.gpu_memory, rates=options.rates, **others
        ),
    )
    size = limit(3, more=ROOM)
    shown = " ".join(cli("plan", "--gpu-memory", size, "--rates", str(rates)).out.split())
    assert "ms with 2048 tokens at once; most of it waits for the link" in shown
    assert "of weights pinned, to be copied to a device" in shown


def test_the_plan_says_who_is_where(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        import_module("lfm2kit.ranks.shares"),
        "set_up",
        lambda _, options, plugins, **others: setup(gpu_memory=options.gpu_memory, **others),
    )
    shown = " ".join(cli("plan", "--gpu-memory", limit(3)).out.split())
    last = len(EXPERTS.local_experts) - 1
    assert f"({len(MOES)} blocks): experts 0-2 resident, 3-{last} host" in shown
    assert "a card <-> host" in shown


@pytest.mark.usefixtures("reference_is_preferred")
@pytest.mark.parametrize(
    ("parallel", "world"), [("dp", World.of(0, (0,) * 4)), ("auto", World.of(0, range(4)))]
)
def test_experts_that_are_not_shared_out_get_the_rows_of_their_own_rank(
    parallel: str, world: World, tmp_path: Path
) -> None:
    rates = write_rates(tmp_path / "rates.json", "streaming", host=1e10, link=3e8)
    asked = {"tokens": 16, "gpu_memory": limit(3, more=ROOM, tokens=16), "rates": rates}
    alone = setup("streaming", **asked).sharing
    assert setup("streaming", world=world, parallel=parallel, **asked).sharing == alone


def test_ranks_that_split_different_shares_have_the_plan_that_was_asked_for_in_common() -> None:
    found = [setup(world=World.of(r, (0, 0, 1)), gpu_memory=limit(9)) for r in range(3)]
    assert len({str(one.plan) for one in found}) == 2
    assert len({str(one.asked) for one in found}) == 1


@pytest.mark.usefixtures("reference_is_preferred")
def test_all_rows_travel_where_no_backend_calls_the_host(tmp_path: Path) -> None:
    """Even if the memory could pick some."""

    class PickingCard(Card):
        def picker(self, wanted: Collection[int]) -> Any:
            raise AssertionError("nobody picks rows")

    class PickingBackend(StreamingCard):
        def __init__(self) -> None:
            super().__init__()
            self.there = PickingCard("elsewhere, a card")

    rates = write_rates(tmp_path / "rates.json", "streaming", host=1e13, link=1e6)
    asked = {"gpu_memory": limit(15), "rates": rates, "streamed_experts": 0}
    plain = setup("streaming", **asked).sharing
    assert setup("streaming", streaming=PickingBackend, **asked).sharing == plain
