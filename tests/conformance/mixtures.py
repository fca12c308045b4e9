"""Plans of any mixture of backends, as hypothesis draws them, and what they may be made of.

The devices are threads, so a forward that goes through three memories is real on any machine.  Each
has a twin in the host's memory with the same blocks, and so with the same bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from lfm2kit import specs
from lfm2kit.backend import (
    API_VERSION,
    Backend,
    BackendPlugin,
    Block,
    Context,
    Room,
    Spec,
    Weights,
)
from lfm2kit.building.fitting import RESERVE
from lfm2kit.building.loading import Setup, set_up
from lfm2kit.building.options import Options
from lfm2kit.building.plan import HOST_EXPERTS, KINDS, STREAMED_EXPERTS
from lfm2kit.building.plugins import InstalledBackend, Plugins, installed_plugins
from lfm2kit.checkpoint import Checkpoint
from lfm2kit.errors import Lfm2kitError
from lfm2kit.host_exchange import AUTO
from lfm2kit.model import JOINS
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.rewrites import Places, SplitExperts, StreamedExperts
from lfm2kit.rewrites.experts_split import experts_split
from lfm2kit.testing import draws, random_weights
from lfm2kit.testing.device import DeviceMemory
from lfm2kit.transport import Transport
from tests.conformance.crossing import DeviceBackend
from tests.core import test_model as boxed
from tests.core.small import small_spec

VOCABULARY = 50
# Two layers or more of each kind, of which `trim` changes the last three.
SPEC = small_spec(
    layer_types=["conv", "full_attention", "conv", "full_attention", "conv", "conv"],
    num_hidden_layers=6,
)
HAS_SIXTEEN_BITS = ("cpu_simd", "hybrid")
CHOICE = "feed_forward.router.choice"


# Memories that count, and backends there.


class Counting:
    """A part of a memory that knows how many arrays came and went."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.copies: Counter[str] = Counter()

    def from_host(self, array: Any) -> Any:
        self.copies["from host"] += 1
        return super().from_host(array)  # type: ignore[misc]


class CountingDevice(Counting, DeviceMemory):
    """A device that is a thread."""

    def __init__(self) -> None:
        super().__init__(2e-5)

    def start_to_host(self, array: Any) -> Any:
        self.copies["to host"] += 1
        return super().start_to_host(array)


class CountingBoxes(Counting, boxed.Elsewhere):
    """A memory without any order, in which nothing can be added."""

    def to_host(self, array: Any) -> Any:
        self.copies["to host"] += 1
        return super().to_host(array)


class Boxed(boxed.DeviceBackend):
    def __init__(self) -> None:
        super().__init__()
        self.there = CountingBoxes()


class WholeLayers(ReferenceBackend):
    """Builds layers whole, and around a choice that is elsewhere, as `cuda` does."""

    def why_unsupported(self, spec: Spec) -> str | None:
        is_known = isinstance(spec, specs.Layer | specs.SparseMoe)
        return None if is_known else super().why_unsupported(spec)

    def build(self, spec: Spec, weights: Weights) -> Block:
        return self._joined(spec, weights, {}) if spec.parts() else super().build(spec, weights)

    def why_not_around(self, spec: Spec, parts: Sequence[str]) -> str | None:
        is_known = isinstance(spec, specs.Layer) and tuple(parts) == (CHOICE,)
        return None if is_known else "it builds a Layer around its choice"

    def build_around(self, spec: Spec, weights: Weights, parts: Mapping[str, Block]) -> Block:
        return self._joined(spec, weights, parts)

    def state_bytes(self, spec: Spec, room: Room) -> int:
        operator = spec.operator if isinstance(spec, specs.Layer) else spec
        return super().state_bytes(operator, room)

    def _joined(
        self, spec: Spec, weights: Weights, given: Mapping[str, Block], path: str = ""
    ) -> Block:
        if path in given:
            return given[path]
        if not spec.parts():
            return self.build(spec, weights)
        parts = {
            part.role: self._joined(
                part.spec, weights.scope(part.scope), given, f"{path}.{part.role}".strip(".")
            )
            for part in spec.parts()
        }
        block: Block = JOINS[type(spec)](self.memory(spec)).make(spec, **parts)
        return block


class Streaming(ReferenceBackend):
    """A part of a device's backend that says what it takes there, and can stream experts."""

    def why_unsupported(self, spec: Spec) -> str | None:
        return None if isinstance(spec, StreamedExperts) else super().why_unsupported(spec)

    def build(self, spec: Spec, weights: Weights) -> Block:
        return super().build(spec.experts if isinstance(spec, StreamedExperts) else spec, weights)

    def kept_bytes(self, spec: Spec, weights: Weights) -> int:
        if not isinstance(spec, StreamedExperts):
            return 4 * spec.weight_elements()
        slots = spec.slots * spec.experts_per_slot if spec.position == 0 else 0
        return slots * 4 * spec.experts.expert.weight_elements()

    def scratch_bytes(self, spec: Spec, tokens: int) -> int:
        return 0


class StreamingDevice(Streaming, DeviceBackend):
    """The reference's blocks on a device."""


class WholeLayersOnDevice(Streaming, WholeLayers, DeviceBackend):
    """Whole layers on a device, where a forward can be captured as well."""


# Places where a mixture is built: which backend each name stands for.


@cache
def plugins(*, are_devices_real: bool = True, has_gpu: bool = True) -> Plugins:
    """Return the installed plugins, and devices; unless these are `real`, they are the host."""
    found = installed_plugins()
    on_devices: dict[str, Callable[[], Backend]] = {
        "cuda": lambda: WholeLayersOnDevice(CountingDevice()),
        "device": lambda: StreamingDevice(CountingDevice()),
        "boxed": Boxed,
    }
    on_host: dict[str, Callable[[], Backend]] = {
        "cuda": WholeLayers,
        "device": ReferenceBackend,
        "boxed": ReferenceBackend,
    }
    for name, create in (on_devices if are_devices_real else on_host).items():
        there = None if has_gpu or name != "cuda" else "there is no GPU"
        found.backends[name] = _announced(name, create, there)
    return found


def _announced(name: str, create: Callable[[], Backend], why_not: str | None) -> InstalledBackend:
    def created(context: Context) -> Backend:
        return create()

    plugin = BackendPlugin(name, "of a test", created, API_VERSION, lambda: why_not)
    return InstalledBackend(plugin, "tests")


@cache
def checkpoint(seed: int) -> Checkpoint:
    """Return random weights whose expert bias has a deviation of 0.3."""
    return Checkpoint(Path("random weights"), SPEC, random_weights(SPEC, seed), None)


@dataclass(frozen=True)
class Mixture:
    """A model's set-up, and the sequences that it is given."""

    plan: str
    sequences: Sequence[Sequence[int]]
    precision: str = "fp32"
    rewrites: tuple[str, ...] = ()
    n_cpu_moe: int = 0
    places: Mapping[int, Places] = field(default_factory=dict)  # of experts, by layer
    gpu_memory: str | None = None  # instead of places
    streamed_experts: int | None = None
    seed: int = 0

    def set_up(self, where: Plugins, transport: Transport | None = None) -> Setup:
        """Return the set-up with the backends there; raise `Lfm2kitError` if it has none."""
        options = Options(
            backend=self.plan,
            precision=self.precision,
            rewrites=self.rewrites,
            n_cpu_moe=self.n_cpu_moe,
            gpu_memory=self.gpu_memory,
            streamed_experts=self.streamed_experts,
            exchange=AUTO if transport is None else "host",  # threads map nobody's GPU memory
        )
        there, split = checkpoint(self.seed), experts_split(self.places)
        if any(kind in self.plan for kind in (STREAMED_EXPERTS, HOST_EXPERTS)):
            return set_up(there, options, plugins=where, transport=transport, rewrites=[split])
        return set_up(there, options, plugins=where, transport=transport).split(self.places)

    def refusal(self, where: Plugins) -> str | None:
        """Return the sentence with which a set-up is refused, if it is."""
        try:
            shortage = self.set_up(where).shortage()
        except Lfm2kitError as error:
            return str(error)
        return None if shortage is None else str(shortage)

    def placed_as(self, setup: Setup) -> Mixture:
        """Return the mixture whose experts are where this one's budget has put them in `setup`."""
        if self.gpu_memory is None:
            return self
        places = {
            int(one.name.split(".")[1]): Places(one.spec.streamed, one.spec.host)
            for one in setup.placed.tree()
            if isinstance(one.spec, SplitExperts)
        }
        return replace(self, gpu_memory=None, streamed_experts=None, places=places)


# What is drawn.


def _layers_with(kind: str) -> list[int]:
    kinds = [{leaf.kind for leaf in specs.leaves(layer)} for layer in SPEC.layers]
    asked = {"experts"} if kind.endswith("_experts") else KINDS[kind]
    return [i for i, there in enumerate(kinds) if there & asked]


@st.composite
def rules(draw: st.DrawFn, backends: st.SearchStrategy[str], kinds: Sequence[str]) -> str:
    """Draw `2-4.moe=NAME`, `moe=NAME` or `2-4=NAME`: mostly one that fits a block."""
    kind = draw(st.sampled_from(kinds))
    layers = _layers_with(kind) if kind else list(range(len(SPEC.layers)))
    where = ""
    if layers and (not kind or draw(st.booleans())):
        first = draw(st.sampled_from(layers))
        last = draw(st.integers(first, len(SPEC.layers) - 1))
        where = draw(st.sampled_from([f"{first}", f"{first}-{last}"]))
    return f"{'.'.join(filter(None, (where, kind)))}={draw(backends)}"


@st.composite
def splits(draw: st.DrawFn) -> Mapping[int, Places]:
    """Draw places for the experts of some sparse layers."""
    some = st.sampled_from(["resident", "streamed", "host"])
    found = {}
    for layer in draw(st.sets(st.sampled_from(_layers_with("experts")), min_size=1)):
        where = draw(st.lists(some, min_size=5, max_size=5))
        of = {role: tuple(e for e in range(5) if where[e] == role) for role in Places._fields}
        found[layer] = Places(**of)
    return found


@st.composite
def budgets(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a limit of a device's memory, too low for all experts, and how many are streamed.

    A model with only some of its blocks there may fit all the same.
    """
    leaves = [leaf for layer in SPEC.layers for leaf in specs.leaves(layer)]
    experts = [leaf.weight_elements() for leaf in leaves if isinstance(leaf, specs.Experts)]
    whole = 4 * (SPEC.weight_elements() + SPEC.lm_head.weight_elements())
    least = whole - 4 * sum(experts)
    limit = draw(st.integers(least, whole)) / (1 - RESERVE)
    streamed = draw(st.sampled_from([None, None, 0, 1, 3]))
    return {"gpu_memory": f"{int(limit) + 1}B", "streamed_experts": streamed}


@st.composite
def sequences(draw: st.DrawFn) -> Sequence[Sequence[int]]:
    lengths = draw(draws.lengths(20, 8))
    ids = np.random.default_rng(draw(st.integers(0, 9))).integers(VOCABULARY, size=sum(lengths))
    ends = np.cumsum(lengths)
    return [ids[end - n : end].tolist() for n, end in zip(lengths, ends, strict=True)]


def items(names: Sequence[str], *, has_sixteen_bits: bool) -> st.SearchStrategy[str]:
    """Return a strategy of a plan's backends, some in a precision of their own."""
    own = ("", ":bf16", ":fp16", ":fp32") if has_sixteen_bits else ("",)
    return st.sampled_from(names).flatmap(
        lambda name: st.sampled_from(
            [name + p for p in own] if name in HAS_SIXTEEN_BITS else [name]
        )
    )


@st.composite
def mixtures(
    draw: st.DrawFn,
    names: Sequence[str],
    *,
    have_budgets: bool = False,
    defaults: Sequence[str] = (),
    kinds: Sequence[str] = ("", *KINDS),
    rewrites: Sequence[tuple[str, ...]] = ((), ("trim",), ("slices",), ("trim", "slices")),
) -> Mixture:
    """Draw a default backend of `defaults`, or else of `names`, and up to four rules."""
    has_sixteen_bits = draw(st.sampled_from([False, False, False, True]))
    default, other = (
        items(some, has_sixteen_bits=has_sixteen_bits) for some in (defaults or names, names)
    )
    places = draw(st.one_of(st.just({}), splits()))
    has_budget = have_budgets and not places and draw(st.booleans())
    budget = draw(budgets()) if has_budget else {}
    there = [kind for kind in kinds if places or not kind.endswith("_experts")]
    return Mixture(
        plan=",".join([draw(default), *draw(st.lists(rules(other, there), max_size=4))]),
        sequences=draw(sequences()),
        rewrites=draw(st.sampled_from(rewrites)),
        n_cpu_moe=draw(st.sampled_from([0, 0, 0, 1, 2])),
        places=places,
        seed=draw(st.sampled_from([0, 1])),
        **budget,
    )


def crossed_mixtures(*, have_budgets: bool = False) -> st.SearchStrategy[Mixture]:
    """Return a strategy of mixtures that hybrid can capture: others build what it can call."""
    return mixtures(
        ("reference", "cpu_simd", "hybrid", "cuda"),
        have_budgets=have_budgets,
        defaults=("hybrid",),
        kinds=[kind for kind in KINDS if kind not in ("embed", "norm", "conv", "attn", "operator")],
        rewrites=[(), ("trim",)],
    )
