"""A memory that is too small is an error before anything is built, with what would fit."""

from __future__ import annotations

import re
from typing import Any

import pytest

from lfm2kit import specs
from lfm2kit.backend import BackendPlugin, Block, Context, Spec, Weights
from lfm2kit.batch import Batch
from lfm2kit.building.answers import came
from lfm2kit.building.byte_counts import size
from lfm2kit.building.loading import Setup, set_up
from lfm2kit.building.options import Options
from lfm2kit.building.plugins import InstalledBackend, installed_plugins
from lfm2kit.errors import Lfm2kitError
from lfm2kit.memory import HostMemory, Memory
from lfm2kit.precisions import BF16_GRADE, FP32, Precision
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.state import Room
from lfm2kit.transport import ExchangeOffer, World
from tests.core.test_model import DeviceBackend, Elsewhere
from tests.random_model import RANDOM

PACKED = {"fp32": 4, "bf16": 2}  # bytes of an element
PRECISIONS = (FP32, Precision("bf16", BF16_GRADE))


class Card(Elsewhere):
    """A device's memory of a size that a test sets."""

    free = 0

    def free_bytes(self) -> int:
        return Card.free


class CardBackend(DeviceBackend):
    built = 0

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.there = Card()
        self.itemsize = PACKED[context.precision]

    def kept_bytes(self, spec: Spec, weights: Weights) -> int:
        return self.itemsize * spec.weight_elements()

    def scratch_bytes(self, spec: Spec, tokens: int) -> int:
        return 1_000_000 * tokens

    def build(self, spec: Spec, weights: Weights) -> Block:
        CardBackend.built += 1
        return super().build(spec, weights)


def card(plan: str = "card", *, transport: Any = None, **options: Any) -> Setup:
    plugins = installed_plugins()
    plugin = BackendPlugin("card", "a small device", CardBackend, 1, precisions=PRECISIONS)
    plugins.backends["card"] = InstalledBackend(plugin, "this test")
    return set_up(RANDOM, Options(backend=plan, **options), transport=transport, plugins=plugins)


def elements(*, without_experts_of: int = 0) -> int:
    """Return the elements of the weights, a tied head's counted again, but for some experts."""
    sparse = [
        x.feed_forward for x in RANDOM.spec.layers if isinstance(x.feed_forward, specs.SparseMoe)
    ]
    left_out = sum(moe.experts.weight_elements() for moe in sparse[:without_experts_of])
    return RANDOM.spec.weight_elements() + RANDOM.spec.lm_head.weight_elements() - left_out


def refusal(setup: Setup) -> str:
    before = CardBackend.built
    with pytest.raises(Lfm2kitError) as refused:
        setup.build()
    assert CardBackend.built == before
    return str(refused.value)


def test_what_just_fits_is_built_and_runs() -> None:
    Card.free = 4 * elements()
    assert card().shortage() is None
    assert card().build().logits(Batch.of_sequences([[1, 2, 3]])).shape == (1, 1024)
    Card.free -= 1
    refusal(card())


def test_too_little_says_what_is_missing_and_what_would_fit(monkeypatch: Any) -> None:
    monkeypatch.setitem(PACKED, "fp32", 4000)  # as if the model were of 10 GB
    monkeypatch.setitem(PACKED, "bf16", 2000)
    Card.free = 4000 * elements(without_experts_of=3)
    needed, free = 4e-6 * elements(), 1e-9 * Card.free
    message = refusal(card())
    assert "memory 'elsewhere' is too small" in message
    assert f"needs {needed:.1f} GB there, {free:.1f} GB are free" in message
    assert f"{needed - free:.1f} GB are missing; " in message
    assert message.endswith("; try precision='bf16' or gpu_memory='free' or n_cpu_moe=3")
    Card.free -= 1
    assert "n_cpu_moe=4" in refusal(card())
    assert "n_cpu_moe=4" in refusal(card(n_cpu_moe=2))


def test_what_would_not_fit_is_not_proposed() -> None:
    Card.free = 2 * elements() - 1
    says = "missing; try gpu_memory='free' or n_cpu_moe=1"
    assert refusal(card(precision="bf16")).endswith(says)
    Card.free = 2 * elements(without_experts_of=6) - 1
    assert "try a smaller model" in refusal(card())


def test_a_precision_that_another_backend_lacks_is_not_proposed() -> None:
    Card.free = 2 * elements()
    assert "precision=" not in refusal(card("card,attn=reference"))


def test_what_other_memories_hold_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReferenceBackend, "kept_bytes", lambda self, spec, weights: 1 << 40)
    monkeypatch.setattr(HostMemory, "free_bytes", lambda self, ranks=1: 1 << 60)
    Card.free = 4 * elements(without_experts_of=6)
    assert card("card,experts=reference").shortage() is None
    assert card("card,experts=reference", rewrites=("trim",)).shortage() is None
    refusal(card())


def test_what_would_fit_goes_with_what_was_asked_for() -> None:
    Card.free = 2 * elements(without_experts_of=6)
    assert "try precision='bf16'" in refusal(card(n_cpu_moe=6))
    assert "precision=" not in refusal(card())
    Card.free = share_of_two(2)
    assert "try precision='bf16'" in refusal(card(transport=TwoRanks()))
    assert "precision=" not in refusal(card())


class TwoRanks:
    world = World(0, 2)


def share_of_two(itemsize: int) -> int:
    """Return the bytes of a rank's blocks: half of the experts, and all else."""
    return itemsize * (elements() + elements(without_experts_of=6)) // 2


def test_a_rank_needs_its_own_share_of_the_experts_alone() -> None:
    Card.free = share_of_two(4)
    assert card(transport=TwoRanks()).shortage() is None
    refusal(card())


class WithBuffers(TwoRanks):
    """A transport whose exchange says that it takes 1000 bytes a token in the card's memory."""

    def exchange_in(self, memory: Memory) -> ExchangeOffer:
        return ExchangeOffer(memory, pytest.fail, scratch_bytes=lambda _, tokens: 1000 * tokens)


def test_the_buffers_of_an_exchange_are_counted_once_for_all_layers() -> None:
    setup = card(transport=WithBuffers())
    needed = setup.sizes.needed(setup.placed, "elsewhere", tokens=7)
    assert (needed.scratch, needed.exchange) == (7_000_000, 7000)
    Card.free = sum(needed)
    assert setup.shortage(7) is None
    Card.free -= 1
    says = "memory 'elsewhere' is too small: the model with 7 tokens at once needs"
    assert str(setup.shortage(7)).startswith(says)


def test_the_exchange_through_the_host_is_counted_there() -> None:
    setup = card(transport=TwoRanks())
    assert setup.sizes.needed(setup.placed, "elsewhere", tokens=7).exchange == 0
    needed = setup.sizes.needed(setup.placed, "host", tokens=7)
    assert needed.exchange > 0 == needed.kept == needed.scratch
    assert "host" in setup.sizes.free(setup.placed)


@pytest.mark.parametrize("wrong", [None, -1, 0.5])
def test_an_exchange_whose_size_is_no_number_of_bytes_is_named(wrong: Any) -> None:
    class Wrong(TwoRanks):
        def exchange_in(self, memory: Memory) -> ExchangeOffer:
            return ExchangeOffer(memory, pytest.fail, scratch_bytes=lambda *_: wrong)

    returned = re.escape(came(wrong))
    says = rf"exchange_bytes of the join of layers\.2\.feed_forward returned {returned}, but must"
    with pytest.raises(Lfm2kitError, match=says):
        card(transport=Wrong()).shortage(1)


def test_an_exchange_that_says_nothing_counts_as_none() -> None:
    class Silent(TwoRanks):
        def exchange_in(self, memory: Memory) -> ExchangeOffer:
            return ExchangeOffer(memory, pytest.fail)

    setup = card(transport=Silent())
    assert setup.sizes.needed(setup.placed, "elsewhere", tokens=7).exchange == 0


def test_a_state_that_does_not_fit_is_refused_before_it_is_allocated(monkeypatch: Any) -> None:
    Card.free = 4 * elements()
    model, room = card().build(), Room(10_000)
    allocated: list[Room] = []
    monkeypatch.setattr(type(model.forward), "new_state", lambda self, room: allocated.append(room))
    backend = ReferenceBackend()
    layers = [layer.operator for layer in RANDOM.spec.layers]
    needed = sum(backend.state_bytes(operator, room) for operator in layers)
    Card.free = needed - 1
    with pytest.raises(Lfm2kitError) as refused:
        model.new_state(room)
    assert allocated == []
    assert str(refused.value).startswith(
        f"memory 'elsewhere' is too small: a state of 10000 pages needs {size(needed)} there, "
    )
    assert str(refused.value).endswith("missing; try fewer sequences at once, or shorter ones")
    Card.free = needed
    monkeypatch.undo()
    model.check_room(room)


def test_each_memory_must_have_room_for_its_own_part_of_a_state(monkeypatch: Any) -> None:
    Card.free = 1 << 40
    model, room = card("card,attn=reference").build(), Room(1000)
    Card.free = 1 << 28
    model.check_room(room)
    monkeypatch.setattr(HostMemory, "free_bytes", lambda self, ranks=1: 1000 // ranks)
    with pytest.raises(Lfm2kitError, match=r"memory 'host' is too small: .* 1 kB are free"):
        model.new_state(room)


class WithoutStateBytes:
    """A backend that builds operators, but does not say what their states take."""

    def __init__(self, context: Context) -> None:
        backend = ReferenceBackend()
        self.why_unsupported = backend.why_unsupported
        self.memory = backend.memory
        self.build = backend.build


def test_a_backend_that_does_not_say_what_states_take_is_named() -> None:
    plugins = installed_plugins()
    plugin = BackendPlugin("silent", "says nothing", WithoutStateBytes, 1)
    plugins.backends["silent"] = InstalledBackend(plugin, "this test")
    setup = set_up(RANDOM, Options(backend="silent"), plugins=plugins)
    says = r"layers.0.operator: backend 'silent' builds ShortConv .* no method state_bytes\(spec, r"
    with pytest.raises(Lfm2kitError, match=says):
        setup.build()
    with pytest.raises(Lfm2kitError, match=says):
        setup.shortage(1, Room(1))


@pytest.mark.parametrize("method", ["kept_bytes", "scratch_bytes", "state_bytes"])
@pytest.mark.parametrize("wrong", [None, -1, 0.5])
def test_a_size_that_is_not_a_number_of_bytes_is_named(
    method: str, wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CardBackend, method, lambda *arguments: wrong)
    Card.free = 1 << 40
    returned = re.escape(came(wrong))
    says = rf"{method} of backend 'card' returned {returned} for \S+, a \w+, but must return"
    with pytest.raises(Lfm2kitError, match=says):
        card().build()
