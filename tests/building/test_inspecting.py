"""Each block's results are looked at once, in a forward of their own, and the first fault named."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import lfm2kit
from lfm2kit import specs
from lfm2kit.backend import BackendPlugin, Spec, Weights
from lfm2kit.batch import Batch
from lfm2kit.building.inspecting import fault_in_a_forward
from lfm2kit.building.loading import load_model, set_up
from lfm2kit.building.options import Options
from lfm2kit.building.plugins import Plugins
from lfm2kit.building.results import Checked
from lfm2kit.errors import Lfm2kitError
from lfm2kit.model import DecoderLayer, Forward
from lfm2kit.overlapped import Overlap
from lfm2kit.ranks.agreement import JointError
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.rewrites.experts_split import experts_split
from lfm2kit.rewrites.hidden_states import HiddenStates
from lfm2kit.rewrites.parted_experts import Places
from lfm2kit.rewrites.trim import TRIM
from lfm2kit.testing import ThreadTransport, run_ranks
from lfm2kit.testing.device import DeviceMemory
from tests.building.test_results import Change, InHalves, Wrong, returning
from tests.conformance.crossing import CrossingBackend
from tests.conformance.crossing import DeviceBackend as LateBackend
from tests.core.small import build, random_weights, small_spec
from tests.core.test_model import AroundBackend, Box, DeviceBackend, FusingBackend
from tests.random_model import RANDOM

BATCH = Batch.of_sequences([[3, 1, 4], [1]])


class Tensor:
    """An array of another library, which has a shape and a type of its own."""

    dtype = "torch.float32"

    def __init__(self, array: Any) -> None:
        self.shape = array.shape


def fault_of(
    plan: str, backends: dict[str, Any], weights: Weights | None = None, **builder: Any
) -> str | None:
    """Return the fault that is found in a small model of this plan."""
    blocks: list[Checked] = []
    weights = weights or random_weights(small_spec())
    model = build(small_spec(), plan, backends, weights=weights, checked=blocks, **builder)
    return fault_in_a_forward(model, blocks, weights)


def fault(spec: type[Spec], change: Change) -> str | None:
    """Return what is found where the blocks of a spec return what `change` makes of it."""
    return fault_of(f"reference,{spec.kind}=wrong", {"wrong": Wrong(spec, returning(change))})


def read_only(array: Any) -> Any:
    array.flags.writeable = False
    return array


def spoilt(value: float) -> Change:
    def spoil(array: Any) -> Any:
        array[2, 5] = value
        return array

    return spoil


OF_MLP = "layers.0.feed_forward: the MLP block of backend 'wrong' returned "


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: None, "None, but must return an array [17, 24]"),
        (lambda x: x.tolist(), "list, but must return an array [17, 24]"),
        (
            Tensor,
            f"a result that is a {__name__}.Tensor, but arrays of memory 'host' are numpy.ndarray",
        ),
        (np.ma.asarray, "a result that is a numpy.ma.MaskedArray, but arrays of memory 'host' are"),
        (lambda x: x.astype(np.float64), "an array [17, 24] of float64, but must return an arr"),
        (np.asfortranarray, "a result that is not C-contiguous, but must be: its strides are (4,"),
        (lambda x: np.repeat(x, 2, 1)[:, ::2], "a result that is not C-contiguous"),
        (read_only, "a result that is read-only, but belongs to the caller, which may write to it"),
        (
            spoilt(np.nan),
            "a result that holds nan at [2, 5] (1 of 408 values are not finite), though its "
            "arguments and weights are finite",
        ),
        (spoilt(-np.inf), "a result that holds -inf at [2, 5]"),
        (lambda x: np.full_like(x, np.nan), "a result that holds nan at [0, 0] (408 of 408"),
    ],
)
def test_a_wrong_result_is_one_sentence_that_names_the_block(change: Change, says: str) -> None:
    said = fault(specs.MLP, change)
    assert said is not None
    assert said.startswith(OF_MLP + says)
    assert "\n" not in said


@pytest.mark.parametrize("kind", [specs.Choice, specs.Router])
def test_of_two_results_the_wrong_one_is_named(kind: type[Spec]) -> None:
    says = "returned a second result that is not C-contiguous"
    assert says in (fault(kind, lambda both: (both[0], np.asfortranarray(both[1]))) or "")
    says = "returned a first result that is not C-contiguous"
    assert says in (fault(kind, lambda both: (np.asfortranarray(both[0]), both[1])) or "")


def returning_argument(number: int, of: Callable[[Any], Any] = lambda x: x) -> Change:
    """Make blocks return one of their arguments, as the last of their results."""

    def changed(block: Any) -> Any:
        def call(*inputs: Any) -> Any:
            result = block(*inputs)
            if inputs[number] is None:
                return result
            own = of(inputs[number])
            return (*result[:-1], own) if isinstance(result, tuple) else own

        if hasattr(block, "new_state"):
            call.new_state = block.new_state  # type: ignore[attr-defined]
        return call

    return changed


@pytest.mark.parametrize(
    ("spec", "number", "says"),
    [
        (specs.MLP, 0, "a result that shares memory with argument 0, but must be a new array"),
        (specs.ShortConv, 0, "a result that shares memory with argument 0"),
        (specs.Experts, 0, "a result that shares memory with argument 0"),
        (specs.RMSNorm, 1, "a second result that shares memory with argument 1"),
        (specs.Choice, 0, "a second result that is not C-contiguous"),
    ],
)
def test_a_result_that_is_an_argument_is_a_fault(spec: type[Spec], number: int, says: str) -> None:
    def own(x: Any) -> Any:
        return x[:, :3] if spec is specs.Choice else x

    wrong = Wrong(spec, returning_argument(number, own))
    assert says in (fault_of(f"reference,{spec.kind}=wrong", {"wrong": wrong}) or "")


class InPlace:
    """A norm that adds into `hidden`, as it may, and returns it."""

    def __init__(self, norm: Any) -> None:
        self.norm = norm

    def __call__(self, hidden: Any, delta: Any) -> Any:
        total, x = self.norm(hidden, delta)
        hidden[...] = total
        return hidden, x


def test_only_the_first_result_of_a_norm_may_be_its_first_argument() -> None:
    def wrong(change: Change) -> str | None:
        return fault_of("reference,norm=wrong", {"wrong": Wrong(specs.RMSNorm, change)})

    assert wrong(InPlace) is None
    twice = wrong(lambda norm: lambda *inputs: (InPlace(norm)(*inputs)[0],) * 2)
    assert "the RMSNorm block" in (twice or "")
    assert "a second result that shares memory with argument 0" in (twice or "")


def test_a_layer_may_return_hidden_and_nothing_else_of_its_arguments() -> None:
    assert fault_of("layers", {"layers": FusingBackend(specs.Layer, DecoderLayer)}) is None

    class Shares(FusingBackend):
        def build(self, spec: Spec, weights: Weights) -> Any:
            block: Any = super().build(spec, weights)
            if not isinstance(spec, specs.Layer):
                return block
            return returning_argument(0)(block)

    said = fault_of("layers", {"layers": Shares(specs.Layer, DecoderLayer)})
    assert "layers.0: the Layer block" in (said or "")
    assert "a second result that shares memory with argument 0" in (said or "")


def test_weights_that_are_not_finite_are_no_blocks_fault() -> None:
    spec = small_spec()
    for name in ("embed_tokens.weight", "layers.1.feed_forward.w2.weight"):
        weights = random_weights(spec)
        arrays = {name: weights.float32(name).copy() for name in spec.parameters()}
        arrays[name][0, 0] = np.nan
        assert fault_of("reference", {}, Weights.of_arrays(arrays)) is None


def test_a_bias_of_minus_infinity_excuses_no_router() -> None:
    spec = small_spec()
    arrays = {name: random_weights(spec).float32(name).copy() for name in spec.parameters()}
    arrays["layers.2.feed_forward.expert_bias"][0] = -np.inf
    change = returning(lambda both: (both[0], both[1] + np.float32(np.nan)))
    wrong = {"wrong": Wrong(specs.Router, change)}
    said = fault_of("reference,router=wrong", wrong, Weights.of_arrays(arrays))
    assert "layers.2.feed_forward.router: the Router block" in (said or "")


def test_the_first_block_that_makes_a_nan_is_named_and_none_after_it() -> None:
    said = fault(specs.Attention, lambda x: x * np.float32(np.nan))
    assert (said or "").startswith("layers.1.operator: the Attention block")


# ---- where blocks are called from ----


class Astray(ReferenceBackend):
    """Returns arrays in the wrong order, from the blocks of some places."""

    def __init__(self, *kinds: type[Spec]) -> None:
        self.kinds = kinds

    def build(self, spec: Spec, weights: Weights) -> Any:
        block: Any = super().build(spec, weights)
        is_wrong = isinstance(spec, self.kinds)
        return returning(_in_wrong_order)(block) if is_wrong else block


def _in_wrong_order(result: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(map(_in_wrong_order, result))
    return np.asfortranarray(result)


def test_a_choice_that_is_crossed_to_is_looked_at() -> None:
    class Backend(LateBackend, CrossingBackend):
        """A device that has its choices made on the host, in the midst of its work."""

        def __init__(self) -> None:
            LateBackend.__init__(self, DeviceMemory(1e-4))
            crossing = CrossingBackend()
            self.why_not_crossed, self.crossing = crossing.why_not_crossed, crossing.crossing

        def why_unsupported(self, spec: Spec) -> str | None:
            return "parts" if isinstance(spec, specs.Router) else super().why_unsupported(spec)

    def found(host: ReferenceBackend) -> str | None:
        return fault_of("device,choice=host", {"device": Backend(), "host": host})

    assert found(ReferenceBackend()) is None
    says = "layers.2.feed_forward.router.choice: the Choice block of backend 'host' returned"
    assert (found(Astray(specs.Choice)) or "").startswith(says)


def test_a_block_that_others_are_built_into_is_looked_at() -> None:
    around = AroundBackend()
    assert fault_of("device", {"device": around}) is None
    around.reference = Astray(specs.Choice)
    said = fault_of("device", {"device": around})
    assert "layers.2.feed_forward.router.choice: the Choice block of backend 'device'" in str(said)


REWRITES = {
    "trimmed": (TRIM, ["experts", "conv", "norm"]),
    "split": (experts_split({2: Places((0, 3), (4,))}), ["experts", "streamed_experts", "norm"]),
}


@pytest.mark.parametrize("name", REWRITES)
def test_blocks_of_a_rewritten_model_are_looked_at(name: str) -> None:
    rewrite, kinds = REWRITES[name]
    for kind in kinds:
        plan = f"reference,2.{kind}=wrong"
        assert fault_of(plan, {"wrong": ReferenceBackend()}, rewrites=[rewrite]) is None
        wrong = Astray(specs.Experts, specs.ShortConv, specs.RMSNorm)
        said = fault_of(plan, {"wrong": wrong}, rewrites=[rewrite])
        assert said is not None, kind
        assert said.startswith("layers.2."), kind
        assert "block of backend 'wrong' returned a" in said, kind


def test_a_call_in_two_halves_is_looked_at_when_it_has_ended() -> None:
    class Begun(Wrong):
        def __init__(self) -> None:
            super().__init__(specs.Experts, lambda block: InHalves(np.zeros((17, 24)).T))

    says = "the Experts block of backend 'wrong' returned an array [24, 17]"
    split = experts_split({2: Places((), (4, 0))})
    plan = "reference,host_experts=wrong"
    assert says in (fault_of(plan, {"wrong": Begun()}, rewrites=[split]) or "")


def test_a_model_that_is_one_block_is_looked_at() -> None:
    whole = FusingBackend(specs.Model, Forward)
    assert fault_of("whole", {"whole": whole}) is None

    class Spoilt(FusingBackend):
        def build(self, spec: Spec, weights: Weights) -> Any:
            return returning(lambda x: x + np.float32(np.inf))(super().build(spec, weights))

    said = fault_of("whole", {"whole": Spoilt(specs.Model, Forward)})
    assert (said or "").startswith("the model: the Model block of backend 'whole' returned a resul")


# ---- arrays of another memory ----


class Abroad(DeviceBackend):
    """Blocks of another memory, of which the MLPs' results are changed."""

    def __init__(self, change: Change) -> None:
        super().__init__()
        self.change = change

    def build(self, spec: Spec, weights: Weights) -> Any:
        block = super().build(spec, weights)
        return returning(self.change)(block) if isinstance(spec, specs.MLP) else block


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda box: None, "returned None, but must return an array [17, 24]"),
        (
            lambda box: box.values,
            "returned a result that is a numpy.ndarray, but arrays of memory 'elsewhere' are "
            "tests.core.test_model.Box",
        ),
        (lambda box: Box(box.values[1:]), "returned an array [16, 24], but must return an array"),
        (
            lambda box: Box(box.values.astype(np.float16)),
            "a result that is float16 [17, 24] on the host, but must be float32 [17, 24]",
        ),
        (lambda box: Box(box.values + np.float32(np.nan)), "a result that holds nan at [0, 0]"),
    ],
)
def test_arrays_of_another_memory_are_judged_by_what_shows(change: Change, says: str) -> None:
    said = fault_of("reference,mlp=abroad", {"abroad": Abroad(change)})
    assert (said or "").startswith("layers.0.feed_forward: the MLP block of backend 'abroad'")
    assert says in (said or "")


def test_sound_blocks_of_another_memory_have_no_fault() -> None:
    assert fault_of("abroad", {"abroad": Abroad(lambda box: box)}) is None
    assert fault_of("late", {"late": LateBackend()}) is None


# ---- when they are looked at ----


def test_each_block_is_called_once_and_later_calls_are_left_alone() -> None:
    calls: list[str] = []

    def noted(block: Any) -> Any:
        def call(*inputs: Any) -> Any:
            calls.append("MLP")
            return block(*inputs)

        return call

    blocks: list[Checked] = []
    weights = random_weights(small_spec())
    wrong = {"wrong": Wrong(specs.MLP, noted)}
    model = build(small_spec(), "reference,mlp=wrong", wrong, weights=weights, checked=blocks)
    before = [block._block for block in blocks]
    assert fault_in_a_forward(model, blocks, weights) is None
    assert calls == ["MLP"] * 2
    assert [block._block for block in blocks] == before


def test_a_fault_that_ends_the_look_leaves_the_blocks_as_they_were() -> None:
    def fails(*inputs: Any) -> Any:
        raise ZeroDivisionError

    blocks: list[Checked] = []
    weights = random_weights(small_spec())
    wrong = {"wrong": Wrong(specs.LMHead, lambda block: fails)}
    model = build(small_spec(), "reference,head=wrong", wrong, weights=weights, checked=blocks)
    before = [block._block for block in blocks]
    with pytest.raises(ZeroDivisionError):
        fault_in_a_forward(model, blocks, weights)
    assert [block._block for block in blocks] == before


def test_a_short_forward_decides_nothing_about_overlap() -> None:
    undecided = Overlap("auto", transport=ThreadTransport.__new__(ThreadTransport), layers=1)
    with undecided.put_off():
        assert undecided.is_on is False
    assert undecided.is_on is None
    decided = Overlap("on", is_on=True)
    with decided.put_off():
        assert decided.is_on is True


def test_hidden_states_of_the_look_are_forgotten() -> None:
    states = HiddenStates([0])
    model = load_model("tiny", "reference", hidden_states=states, check=True)
    assert states.newest() == {}
    model.logits(BATCH)
    assert states.newest()[0].shape == (4, 256)


# ---- who asks for it ----


def plugins_with(wrong: ReferenceBackend, monkeypatch: pytest.MonkeyPatch) -> Plugins:
    module = ModuleType("odd")

    def lfm2kit_backends() -> Iterator[BackendPlugin]:
        yield BackendPlugin("wrong", "", lambda context: wrong, api_version=1)

    module.lfm2kit_backends = lfm2kit.hookimpl(lfm2kit_backends)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "odd", module)
    return Plugins(
        [
            EntryPoint("odd", "odd", "lfm2kit"),
            EntryPoint("reference", "lfm2kit.reference", "lfm2kit"),
        ]
    )


def test_a_model_is_looked_at_only_if_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    plugins = plugins_with(Astray(specs.MLP), monkeypatch)

    def built(**options: Any) -> Any:
        asked = Options(backend="reference,mlp=wrong", **options)
        return set_up(RANDOM, asked, plugins=plugins).build()

    built().logits(BATCH)
    says = "layers.0.feed_forward: the MLP block of backend 'wrong' of unknown returned a result"
    with pytest.raises(Lfm2kitError, match=says):
        built(check=True)


@pytest.mark.parametrize("value", [1, "yes", None])
def test_the_option_is_true_or_false(value: Any) -> None:
    with pytest.raises(Lfm2kitError, match=r"check.*: expected True or False"):
        Options(check=value)


@pytest.mark.parametrize("size", [2, 3])
def test_what_one_rank_finds_every_rank_raises(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong, sound = Astray(specs.Experts), ReferenceBackend()
    of_rank = [plugins_with(one, monkeypatch) for one in (sound, wrong, sound)]

    def rank(transport: ThreadTransport) -> str:
        plugins = of_rank[transport.world.rank]
        options = Options(backend="reference,experts=wrong", check=True)
        setup = set_up(RANDOM, options, plugins=plugins, transport=transport)
        with pytest.raises(JointError) as raised:
            setup.build()
        return str(raised.value)

    (said,) = set(run_ranks(size, rank))
    says = "rank 1: layers.2.feed_forward.experts: the Experts block of backend 'wrong' of unknown"
    assert said.startswith(says)
