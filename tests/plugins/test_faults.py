"""What a plugin does wrong is one line that names it, and harms nothing else."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest

import lfm2kit
from lfm2kit.backend import (
    API_VERSION,
    F32,
    FP32,
    HOST,
    BackendPlugin,
    Ceilings,
    Context,
    HostMemory,
    Precision,
    Promise,
    Room,
)
from lfm2kit.building.answers import Answers, came
from lfm2kit.building.capacity import free_bytes
from lfm2kit.building.loading import Setup, set_up
from lfm2kit.building.options import Options
from lfm2kit.building.placement import Placed
from lfm2kit.building.plugins import Plugins, installed_plugins
from lfm2kit.building.wrappers import Wrappers
from lfm2kit.checkpoint import Checkpoint, open_checkpoint
from lfm2kit.checkpoint.readers import CheckpointReader
from lfm2kit.cli.plan import _row
from lfm2kit.formats import Format
from lfm2kit.measuring.bench import measured_ceilings
from lfm2kit.precisions import BF16_GRADE, FP32_GRADE, Grade
from lfm2kit.records.machine import hardware_of
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.rewrites import Join
from lfm2kit.specs import MLP, Layer, Model, Part, Spec
from lfm2kit.transport import TransportPlugin, World
from lfm2kit.weights import Tensor, Weights
from tests.random_model import RANDOM

Load = Callable[..., Plugins]
Yielding = Callable[..., Plugins]


def raises(error: BaseException) -> Callable[..., Any]:
    def raising(*arguments: Any, **more: Any) -> Any:
        raise error

    return raising


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Load plugins of one module with these hooks, the entry point `odd`, besides `reference`."""

    def loaded(**hooks: Any) -> Plugins:
        module = ModuleType("odd")
        for name, hook in hooks.items():
            setattr(module, name, lfm2kit.hookimpl(hook))
        monkeypatch.setitem(sys.modules, "odd", module)
        plugins = Plugins([EntryPoint("odd", "odd", "lfm2kit")])
        plugins.backends["reference"] = installed_plugins().backends["reference"]
        return plugins

    return loaded


@pytest.fixture
def yielding(load: Load) -> Yielding:
    """Return plugins of one whose hook `name` yields these values."""

    def announced(name: str, *values: Any) -> Plugins:
        return load(**{name: lambda: iter(values)})

    return announced


def a_backend(**fields: Any) -> BackendPlugin:
    usual = {"summary": "", "create": lambda context: ReferenceBackend(), "api_version": 1}
    return BackendPlugin("bb", **{**usual, **fields})


def a_rewrite(apply: Any = lambda model: model, **fields: Any) -> lfm2kit.Rewrite:
    return lfm2kit.Rewrite("x", fields.pop("summary", "a line"), apply, **fields)


def a_reader(recognises: Any, open_it: Any = lambda path: None) -> CheckpointReader:
    return CheckpointReader("k", "a line", recognises, open_it)


GRADE_OF_TEXT = Grade("odd", "much", "logits")


@pytest.mark.parametrize(
    ("hook", "wrong", "reason"),
    [
        ("lfm2kit_backends", a_backend(preference="high"), "preference is 'high', not a whole num"),
        ("lfm2kit_backends", a_backend(api_version="1"), "api_version is '1', not a whole number"),
        ("lfm2kit_backends", a_backend(summary=None), "summary is None, not a text"),
        ("lfm2kit_backends", a_backend(create=None), "create is None, not a function"),
        ("lfm2kit_backends", a_backend(why_unavailable="no"), "is 'no', not a function"),
        (
            "lfm2kit_backends",
            a_backend(not_promised={"BATCH_INVARIANCE": "it sums otherwise"}),
            "not_promised is {'BATCH_INVARIANCE': 'it sums otherwise'}, not a mapping of promises",
        ),
        (
            "lfm2kit_backends",
            a_backend(not_promised={Promise.REPEATABILITY: None}),
            "None}, not a mapping of promises to reasons",
        ),
        ("lfm2kit_backends", a_backend(not_promised={Promise.REPEATABILITY: ""}), "to reasons of"),
        ("lfm2kit_backends", a_backend(not_promised=[Promise.REPEATABILITY]), "not a mapping of"),
        ("lfm2kit_backends", a_backend(precisions=()), "precisions is (), not a tuple of one or"),
        ("lfm2kit_backends", a_backend(precisions=iter([FP32])), "not a tuple of one or more"),
        ("lfm2kit_backends", a_backend(precisions=None), "precisions is None, not a tuple"),
        ("lfm2kit_backends", a_backend(precisions=(FP32, FP32)), "announces 'fp32' twice"),
        (
            "lfm2kit_backends",
            a_backend(precisions=(Precision("fp32", "exact"),)),
            "the precision 'fp32', whose grade is 'exact', not a Grade",
        ),
        (
            "lfm2kit_backends",
            a_backend(precisions=(Precision("fp32", None),)),
            "whose grade is None, not a Grade",
        ),
        (
            "lfm2kit_backends",
            a_backend(precisions=(Precision("fp32", GRADE_OF_TEXT),)),
            "grade's block_error is 'much', not a number",
        ),
        (
            "lfm2kit_backends",
            a_backend(precisions=(Precision("fp32", FP32_GRADE, "BF16"),)),
            "weights is 'BF16', not a Format or None",
        ),
        (
            "lfm2kit_backends",
            a_backend(precisions=(Precision(5, BF16_GRADE),)),
            "announces the precision Precision(name=5",
        ),
        ("lfm2kit_transports", TransportPlugin("t", "", None), "launcher is None, not a Launcher"),
        ("lfm2kit_checkpoints", a_reader("all"), "recognises is 'all', not a function"),
        ("lfm2kit_checkpoints", a_reader(bool, None), "open is None, not a function"),
        ("lfm2kit_commands", lfm2kit.Command("hi", None), "run is None, not a function"),
        ("lfm2kit_rewrites", a_rewrite("x"), "apply is 'x', not a function"),
        ("lfm2kit_rewrites", a_rewrite(joins=42), "joins is 42, not a mapping of types of specs"),
        ("lfm2kit_rewrites", a_rewrite(joins={"MLP": 5}), "not a mapping of types of specs"),
        ("lfm2kit_rewrites", a_rewrite(summary=None), "summary is None, not a text"),
        ("lfm2kit_rewrites", a_rewrite(has_state=None), "has_state is None, not True or False"),
        ("lfm2kit_rewrites", a_rewrite(keeps_rows=0), "keeps_rows is 0, not True or False"),
        ("lfm2kit_rewrites", a_rewrite(needs_rows="no"), "needs_rows is 'no', not True or False"),
    ],
)
def test_a_plugin_that_announces_nonsense_is_set_aside(
    yielding: Yielding, hook: str, wrong: Any, reason: str
) -> None:
    plugins = yielding(hook, wrong)
    (broken,) = plugins.broken
    assert reason in broken.reason
    assert hook in broken.reason or "backend 'bb' announces" in broken.reason
    assert plugins.auto() == "reference"


def test_a_reason_that_is_no_text_is_one(yielding: Yielding) -> None:
    plugins = yielding("lfm2kit_backends", a_backend(why_unavailable=lambda: 42))
    assert plugins.broken == []
    assert plugins.backends["bb"].why_not == "its why_unavailable() returned 42, not a text or None"


def test_a_backend_of_another_api_is_listed_all_the_same(yielding: Yielding) -> None:
    plugins = yielding("lfm2kit_backends", a_backend(api_version=API_VERSION + 1))
    assert "it is written for backend API" in (plugins.backends["bb"].why_not or "")


@pytest.mark.parametrize("made", [None, 42, object()])
def test_what_is_created_is_a_backend(yielding: Yielding, made: Any) -> None:
    plugins = yielding("lfm2kit_backends", a_backend(create=lambda context: made))
    sentence = r"create\(\) of backend 'bb' of unknown returned .*, not a Backend"
    with pytest.raises(lfm2kit.Lfm2kitError, match=sentence):
        plugins.creator(Context())("bb")


# ---- what backends answer ----

WHOLE = r"a whole number \(int\) of 0 or more"
REASON = "a text or None"
NONSENSE: list[tuple[str, Any, str]] = [
    ("why_unsupported", 42, REASON),
    ("why_unsupported", False, REASON),
    ("memory", None, "a Memory"),
    ("memory", "host", "a Memory"),
    ("kept_bytes", None, WHOLE),
    ("kept_bytes", 4096.0, WHOLE),
    ("scratch_bytes", np.float32(7), WHOLE),
    ("kept_bytes", -1, WHOLE),
    ("scratch_bytes", "7", WHOLE),
    ("state_bytes", 0.5, WHOLE),
    ("state_bytes", True, WHOLE),
    ("pinned_bytes", None, WHOLE),
    ("pinned_bytes", -1, WHOLE),
    ("kept_formats", None, "a mapping of .* to Formats"),
    ("kept_formats", {"weight": "F32"}, "a mapping of weight to Formats"),
    ("kept_formats", {"odd": F32}, "a mapping of weight to Formats"),
    ("notes", None, "a list of texts"),
    ("notes", "a note", "a list of texts"),
    ("notes", [1], "a list of texts"),
    ("hardware", None, "a mapping of texts to texts"),
    ("hardware", {"device": 5}, "a mapping of texts to texts"),
    ("ceilings", None, "Ceilings of two finite numbers above 0"),
    ("ceilings", Ceilings(0, 1.0), "Ceilings of two finite numbers above 0"),
    ("ceilings", Ceilings(1e12, np.inf), "Ceilings of two finite numbers above 0"),
    ("ceilings", (1.0, 1.0), "Ceilings of two finite numbers above 0"),
]


class Answering(ReferenceBackend):
    """Has every method that the core asks before it builds."""

    def kept_bytes(self, spec: Spec, weights: Weights) -> int:
        return 0

    def scratch_bytes(self, spec: Spec, tokens: int) -> int:
        return 0

    def pinned_bytes(self, spec: Spec, weights: Weights) -> int:
        return 0

    def kept_formats(self, spec: Spec, weights: Weights) -> dict[str, Format]:
        return dict.fromkeys(spec.parameters(), F32)

    def notes(self) -> list[str]:
        return []

    def ceilings(self) -> Ceilings:
        return Ceilings(1.0, 1.0)

    def hardware(self) -> dict[str, str]:
        return {}


def asked_all(yielding: Yielding, **methods: Any) -> None:
    """Ask a backend with these methods all that commands ask before they build."""

    def create(context: Context) -> Any:
        return type("Odd", (Answering,), methods)()

    plugins = yielding("lfm2kit_backends", a_backend(create=create))
    setup = set_up(RANDOM, Options(backend="bb"), plugins=plugins)
    list(setup.notes())
    setup.shortage(1, Room(1))
    for leaf in setup.placed.leaves():
        _row(leaf, setup, 1, Room(1))
    measured_ceilings(setup)
    hardware_of(Answers(setup.create("bb"), "bb"), HOST)


def test_a_backend_that_keeps_to_the_contract_is_asked_all(yielding: Yielding) -> None:
    asked_all(yielding)


@pytest.mark.parametrize(("method", "answer", "words"), NONSENSE)
def test_an_answer_that_the_contract_does_not_know_is_named(
    yielding: Yielding, method: str, answer: Any, words: str
) -> None:
    sentence = rf"{method} of backend 'bb' returned {re.escape(came(answer))}.*, but must return "
    with pytest.raises(lfm2kit.Lfm2kitError, match=sentence + words) as raised:
        asked_all(yielding, **{method: lambda *arguments: answer})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("method", sorted({method for method, _, _ in NONSENSE}))
@pytest.mark.parametrize("error", [KeyError("w"), SystemExit(3)])
def test_a_backend_that_raises_when_asked_is_named(
    yielding: Yielding, method: str, error: BaseException
) -> None:
    sentence = f"{method} of backend 'bb',? .*raised {type(error).__name__}: .*TRACEBACK=1"
    with pytest.raises(lfm2kit.Lfm2kitError, match=sentence):
        asked_all(yielding, **{method: raises(error)})


def test_an_answer_is_shown_with_its_type(yielding: Yielding) -> None:
    shown = {0.5: "0.5 (float)", "7": "'7' (str)", True: "True (bool)", None: "None"}
    assert {answer: came(answer) for answer in shown} == shown
    says = "state_bytes of backend 'bb' returned 0.5 (float) for layers.0.operator, a ShortConv, "
    with pytest.raises(lfm2kit.Lfm2kitError) as raised:
        asked_all(yielding, state_bytes=lambda *arguments: 0.5)
    assert str(raised.value) == f"{says}but must return a whole number (int) of 0 or more"


def test_a_backend_that_does_not_say_what_it_builds_around_is_named() -> None:
    class Around(Answering):
        def why_not_around(self, spec: Spec, parts: Any) -> Any:
            return 42

    layer = RANDOM.spec.layers[2]
    asked = Answers(Around(), "bb", "layers.2")
    sentence = "why_not_around of backend 'bb' returned 42 .int. for layers.2, a Layer, but must"
    with pytest.raises(lfm2kit.Lfm2kitError, match=sentence):
        asked.why_not_around(layer, ["feed_forward.router.choice"])


@pytest.mark.parametrize("free", [None, -1, "7"])
def test_a_memory_that_does_not_know_what_is_free_is_named(free: Any) -> None:
    class Odd(HostMemory):
        name = "odd"

        def free_bytes(self, ranks: int = 1) -> Any:
            return free

    with pytest.raises(lfm2kit.Lfm2kitError, match=r"free_bytes of memory 'odd' returned .* whole"):
        free_bytes(Placed("", "", MLP(2, 3), Odd(), HOST, "bb"))


# ---- wrappers ----

BLOCKS = [("", "the model"), ("layers.0.feed_forward", "layers.0.feed_forward")]


def around(name: str, plugins: Plugins) -> Wrappers:
    return Wrappers.of(Placed(name, name, MLP(2, 3), HOST, HOST, "reference"), plugins)


@pytest.mark.parametrize(("name", "said"), BLOCKS)
@pytest.mark.parametrize("error", [RuntimeError("boom\nsecond"), SystemExit(4)])
def test_a_hook_for_wrappers_that_raises_is_named(
    load: Load, name: str, said: str, error: BaseException
) -> None:
    def lfm2kit_block_wrapper(name: str) -> Any:
        raise error

    first = str(error).splitlines()[0]
    sentence = f"plugin 'odd', asked about {said}, raised {type(error).__name__}: {first};"
    with pytest.raises(lfm2kit.Lfm2kitError, match=sentence) as raised:
        around(name, load(lfm2kit_block_wrapper=lfm2kit_block_wrapper))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("returned", [42, lambda block: block, lfm2kit.Wrapper(5)])
def test_a_hook_for_wrappers_that_returns_none_is_named(load: Load, returned: Any) -> None:
    def lfm2kit_block_wrapper(name: str) -> Any:
        return returned

    with pytest.raises(lfm2kit.Lfm2kitError, match=r"plugin 'odd', asked about the model, returne"):
        around("", load(lfm2kit_block_wrapper=lfm2kit_block_wrapper))


@pytest.mark.parametrize(("name", "said"), BLOCKS)
def test_a_wrapper_that_makes_no_block_is_named(load: Load, name: str, said: str) -> None:
    def wrapped(wrap: Any) -> Any:
        def lfm2kit_block_wrapper(name: str) -> Any:
            return lfm2kit.Wrapper(wrap)

        wrappers = around(name, load(lfm2kit_block_wrapper=lfm2kit_block_wrapper))
        return wrappers.wrap(name, MLP(2, 3), lambda x: x)

    who = f"plugin 'odd', wrapping {said},"
    with pytest.raises(lfm2kit.Lfm2kitError, match=f"{who} returned None, not a block"):
        wrapped(lambda block: None)
    with pytest.raises(lfm2kit.Lfm2kitError, match=f"{who} raised KeyError: 'w'"):
        wrapped(raises(KeyError("w")))


# ---- rewrites ----


@dataclass(frozen=True, slots=True)
class Boxed(Spec):
    """A layer in a box."""

    layer: Layer
    kind: ClassVar[str] = "layer"

    def parts(self) -> tuple[Part, ...]:
        return self.layer.parts()


def boxed(model: Model) -> Model:
    return replace(model, layers=tuple(Boxed(layer) for layer in model.layers))


@dataclass(frozen=True, slots=True)
class Odd(Spec):
    """A spec of any parts, and of no kind."""

    its_parts: tuple[Part, ...]

    def parts(self) -> tuple[Part, ...]:
        return self.its_parts


def odd(*roles: str, spec: Any = None) -> Callable[[Model], Model]:
    """Return a rewrite's function whose first layer has parts of these roles."""

    def made(layers: tuple[Spec, ...]) -> tuple[Spec, ...]:
        parts = tuple(Part(role, "", spec or layers[0]) for role in roles)
        return (type("Odd", (Odd,), {"kind": "odd"})(parts), *layers[1:])

    return has_layers(made)


def set_up_with(plugins: Plugins, world: World | None = None) -> Setup:
    options = Options(backend="reference", rewrites=("x",))
    return set_up(RANDOM, options, plugins=plugins, world=world)


def has_layers(change: Callable[[Any], Any]) -> Callable[[Model], Model]:
    return lambda model: replace(model, layers=change(model.layers))


def larger(model: Model) -> Model:
    return replace(model, embed_tokens=replace(model.embed_tokens, vocab_size=4096))


@pytest.mark.parametrize(
    ("rewrite", "sentence"),
    [
        (a_rewrite(lambda model: None), "rewrite 'x' of plugin 'odd' returned None, not a Model"),
        (a_rewrite(lambda model: "model"), "returned 'model', not a Model"),
        (a_rewrite(lambda model: model.layers[0]), "returned <?Layer.*, not a Model"),
        (a_rewrite(raises(KeyError("w"))), "plugin 'odd' raised KeyError: 'w'"),
        (a_rewrite(raises(SystemExit(3))), "plugin 'odd' raised SystemExit: 3"),
        (a_rewrite(has_layers(lambda layers: ())), r"the layers are \(\), not a tuple of specs"),
        (a_rewrite(has_layers(list)), r"the layers are \[.*, not a tuple of specs"),
        (a_rewrite(has_layers(lambda all: (None, *all[1:]))), r"layers\.0 is None, not a Spec"),
        (a_rewrite(has_layers(lambda all: all[:3])), r"leaves out tensor 'layers\.3\..* more"),
        (a_rewrite(has_layers(lambda all: all * 2)), r"there is no tensor 'layers\.8\."),
        (a_rewrite(has_layers(lambda all: (Odd(()), *all[1:]))), r"layers\.0, a Odd, has no kind"),
        (a_rewrite(odd("a", spec="b")), r"layers\.0\.a is 'b', not a Spec"),
        (a_rewrite(odd("a", "a")), r"layers\.0 has two parts 'a'"),
        (a_rewrite(larger), r"has shape \[\d+, 128\], but its model needs \[4096, 128\]"),
        (a_rewrite(boxed, joins={Boxed: lambda outer: 5}), "a join of rewrite 'x' .* is 5, not a"),
        (a_rewrite(boxed, joins={Boxed: raises(KeyError("w"))}), "a join of .* raised KeyError"),
    ],
)
def test_a_rewrite_that_breaks_the_contract_is_named(
    yielding: Yielding, rewrite: Any, sentence: str
) -> None:
    plugins = yielding("lfm2kit_rewrites", rewrite)
    with pytest.raises(lfm2kit.Lfm2kitError, match=sentence) as raised:
        set_up_with(plugins)
    assert "\n" not in str(raised.value)
    assert "rewrite 'x' of plugin 'odd'" in str(raised.value)


@pytest.mark.parametrize("make", [lambda spec, **parts: None, raises(KeyError("w"))])
def test_a_join_that_makes_no_block_is_named(yielding: Yielding, make: Any) -> None:
    joins = {Boxed: lambda outer: Join(make, outer)}
    setup = set_up_with(yielding("lfm2kit_rewrites", a_rewrite(boxed, joins=joins)))
    with pytest.raises(lfm2kit.Lfm2kitError, match="of plugin 'odd', joining a Boxed, r"):
        setup.build()


def test_a_rank_may_hold_fewer_tensors_than_the_model_has(yielding: Yielding) -> None:
    plugins = yielding("lfm2kit_rewrites", a_rewrite(has_layers(lambda all: all[:3])))
    assert len(set_up_with(plugins, World(0, 2)).placed.spec.layers) == 3


@pytest.mark.parametrize("error", [RuntimeError("boom\nsecond"), SystemExit(7)])
def test_a_hook_for_rewrites_that_fails_in_a_job_is_named(load: Load, error: Any) -> None:
    def lfm2kit_rewrites(world: World) -> Any:
        if world.size > 1:
            raise error
        return ()

    plugins = load(lfm2kit_rewrites=lfm2kit_rewrites)
    first = str(error).splitlines()[0]
    sentence = f"plugin 'odd', asked for rank 1 of 2, raised {type(error).__name__}: {first};"
    with pytest.raises(lfm2kit.Lfm2kitError, match=sentence):
        plugins.rewrites(World(1, 2))


# ---- readers ----


def opened(yielding: Yielding, path: Path, change: Callable[[Checkpoint], Any]) -> Checkpoint:
    """Return the embedded model as a reader opens it that changes something."""

    def open_it(path: Path) -> Any:
        return change(RANDOM)

    plugins = yielding("lfm2kit_checkpoints", a_reader(lambda asked: asked == path, open_it))
    return open_checkpoint(path, plugins.readers.values())


def with_tensor(made: Callable[[Tensor], Any]) -> Callable[[Checkpoint], Checkpoint]:
    """Return a change of the first convolution's matrix."""
    name = "layers.0.conv.out_proj.weight"

    def change(checkpoint: Checkpoint) -> Checkpoint:
        weights = checkpoint.weights
        return replace(checkpoint, weights=Weights({**weights, name: made(weights[name])}))

    return change


def stored(unpack: Any, name: str = "odd") -> Callable[[Checkpoint], Checkpoint]:
    """Return a change that stores this matrix in a format with this `unpack`."""

    def made(tensor: Tensor) -> Tensor:
        format = Format(name, 1, np.dtype("<f4"), unpack)
        return Tensor(tensor.name, format, tensor.shape, tensor.float32())

    return with_tensor(made)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda good: replace(good, spec=None), "returned a Checkpoint whose spec is None"),
        (lambda good: replace(good, weights=None), "returned a Checkpoint whose weights is None"),
        (lambda good: replace(good, remarks=5), "returned a Checkpoint whose remarks is 5"),
        (lambda good: replace(good, remarks=(5,)), r"a Checkpoint whose remarks is \(5,\)"),
        (lambda good: replace(good, path="x"), "returned a Checkpoint whose path is 'x'"),
        (lambda good: replace(good, config={}), "returned a Checkpoint whose config is {}"),
        (with_tensor(lambda tensor: 42), "tensor 'layers.0.conv.out_proj.weight' is 42, not a T"),
        (
            with_tensor(lambda tensor: Format("odd", 1, "<f4", abs)),
            "TypeError: format odd: block",
        ),
        (stored(lambda data: 1 / 0), "format odd, unpacking .* raised ZeroDivisionError"),
        (stored(lambda data: None), "format odd, unpacking .* returned None"),
        (stored(lambda data: data.astype("<f8")), r"returned \[1, 128\] of float64"),
        (stored(lambda data: np.concatenate([data, data], -1)), r"returned \[1, 256\] of float32"),
        (stored(lambda data: 2 * data, "F32"), "is in a format of its own that is called F32"),
    ],
)
def test_a_reader_that_breaks_the_contract_is_named(
    yielding: Yielding, tmp_path: Path, change: Any, said: str
) -> None:
    who = f"{tmp_path}: reader 'k' of unknown"
    with pytest.raises(lfm2kit.Lfm2kitError, match=f"^{who}.* ?{said}") as raised:
        opened(yielding, tmp_path, change)
    assert "\n" not in str(raised.value)


def test_a_reader_may_bring_formats_of_its_own(yielding: Yielding, tmp_path: Path) -> None:
    checkpoint = opened(yielding, tmp_path, stored(lambda data: data))
    assert "odd" in {tensor.format.name for tensor in checkpoint.weights.values()}


def test_a_reader_whose_answer_has_no_truth_is_named(yielding: Yielding, tmp_path: Path) -> None:
    plugins = yielding("lfm2kit_checkpoints", a_reader(lambda path: np.zeros(3)))
    with pytest.raises(lfm2kit.Lfm2kitError, match="reader 'k' of unknown raised ValueError"):
        open_checkpoint(tmp_path, plugins.readers.values())
