"""Options are defined once: bounds and words are the same for Python and the command line."""

from __future__ import annotations

from dataclasses import fields
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from lfm2kit.backend import BackendPlugin, Context
from lfm2kit.building.loading import load_model, set_up
from lfm2kit.building.options import Options
from lfm2kit.building.plugins import InstalledBackend, Plugins, installed_plugins
from lfm2kit.cli.flags import told
from lfm2kit.cli.options import SHORT, spread
from lfm2kit.errors import Lfm2kitError
from tests.checkpoint.typed import Cli
from tests.core.test_model import DeviceBackend
from tests.random_model import RANDOM


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"threads": 0}, "threads=0: expected a whole number of 1 or more, such as threads=1"),
        ({"threads": 2**21}, "threads=2097152: lfm2kit takes up to 1048576"),
        ({"threads": "2"}, "threads='2': expected a whole number"),
        ({"threads": True}, "threads=True: expected a whole number"),
        ({"trim": True}, "'trim' is a rewrite; type rewrites=('trim',)"),
        (
            {"preciison": "bf16"},
            "unknown option 'preciison'; available: backend, check, ep_size, exchange, gpu",
        ),
        ({"rewrites": "trim"}, "rewrites='trim': expected a tuple of names, such as ('NAME',)"),
        ({"rewrites": 7}, "rewrites=7: expected a tuple of names"),
        ({"rewrites": (7,)}, "rewrites=(7,): expected a tuple of names"),
        ({"rewrites": [["trim"]]}, "rewrites=[['trim']]: expected a tuple of names"),
        ({"rewrites": None}, "rewrites: expected a tuple of names"),
        ({"n_cpu_moe": None}, "n_cpu_moe: expected a whole number of 0 or more"),
        ({"threads": [2]}, "threads=[2]: expected a whole number"),
        ({"seed": 0.5}, "seed=0.5: expected a whole number of 0 or more"),
        ({"model": 7}, "model=7: expected a path, or a model's name, such as 'tiny'"),
        ({"model": None}, "model: expected a path"),
        ({"model": b"tiny"}, "model=b'tiny': expected a path"),
        ({"backend": ["reference"]}, "backend=['reference']: expected a plan as text"),
        ({"plan": {}}, "plan={}: expected the path of a TOML file"),
        ({"backend": 5}, "backend=5: expected a plan as text"),
        ({"plan": 5}, "plan=5: expected the path of a TOML file"),
        ({"precision": 5}, "precision=5: expected a name"),
        ({"precision": ""}, "precision='': expected a name"),
        ({"precision": None}, "precision: expected a name"),
        (
            {"n_cpu_moe": -1},
            "n_cpu_moe=-1: expected a whole number of 0 or more, such as n_cpu_moe=0",
        ),
        ({"n_cpu_moe": 7, "backend": "reference"}, "n_cpu_moe=7: the model has 4 MoE layers"),
    ],
)
def test_a_wrong_option_is_one_sentence_in_the_words_of_python(
    options: dict[str, Any], says: str
) -> None:
    with pytest.raises(Lfm2kitError) as caught:
        load_model(**{"model": "tiny", **options})
    assert str(caught.value).startswith(says)


def test_a_plan_as_a_file_needs_no_other_backend(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text('default = "reference"\n')
    model = load_model("tiny", plan=str(path))
    assert {leaf.backend for leaf in model.placed.leaves()} == {"reference"}


def test_a_plan_as_text_and_as_a_file_are_both_named() -> None:
    with pytest.raises(Lfm2kitError) as caught:
        Options(backend="reference", plan=Path("p.toml")).chosen_plan()
    assert str(caught.value) == "backend='reference' and plan='p.toml': give only one of them"
    assert told(caught.value) == "--backend reference and --plan p.toml: give only one of them"


@pytest.mark.parametrize("command", ["run", "plan", "warmup"])
def test_every_option_is_a_flag_with_its_help(command: str, cli: Cli) -> None:
    words = " ".join(cli(command, "--help").out.replace("│", " ").split())
    for option in fields(Options):
        if option.name in ("seed", "check") and command != "run":
            continue  # what they show or compile is neither random nor looked at
        if option.name == "rewrites":
            assert "--trim" in words
            assert "--rewrite" in words
            continue
        flag = f"--{option.name.replace('_', '-')}"
        assert flag in words
        assert SHORT.get(option.name, flag) in words
        assert option.metadata["about"].help.split()[0] in words


def test_a_dataclass_of_options_is_made_of_what_was_typed() -> None:
    seen: list[object] = []

    @spread
    def command(options: Options, more: int = 3) -> None:
        seen.extend((options, more))

    defaults = {f.name: f.default for f in fields(Options)}
    del defaults["rewrites"]
    command(**defaults | {"threads": 2, "trim": True, "rewrite": ["mine"]}, more=4)
    assert seen == [Options(threads=2, rewrites=("trim", "mine")), 4]


# ---- which backend gets experts that go to the host ----


def plugins_with(preference: int, backend: Any) -> Plugins:
    """Return the installed plugins and one more backend."""
    plugins = installed_plugins()
    plugin = BackendPlugin("mine", "", lambda context: backend, 1, preference=preference)
    plugins.backends["mine"] = InstalledBackend(plugin, "this test")
    return plugins


def experts_of_layer_2(plugins: Plugins) -> str | None:
    setup = set_up(RANDOM, Options(backend="reference", n_cpu_moe=1), plugins=plugins)
    leaves = {leaf.name: leaf.backend for leaf in setup.placed.leaves()}
    return leaves["layers.2.feed_forward.experts"]


def test_experts_on_the_host_come_from_the_most_preferred_backend_that_lives_there() -> None:
    reference: Any = installed_plugins().creator(Context())("reference")
    assert experts_of_layer_2(plugins_with(1000, reference)) == "mine"
    assert experts_of_layer_2(plugins_with(1000, DeviceBackend())) != "mine"
    assert experts_of_layer_2(plugins_with(0, reference)) != "mine"


@pytest.mark.parametrize(
    ("plan", "precision", "expected"),
    [
        ("cpu_simd:bf16", "fp32", "cpu_simd:bf16"),
        ("cpu_simd,2.moe=cpu_simd:bf16", "fp32", "cpu_simd:bf16"),
        ("cpu_simd:fp32", "bf16", "cpu_simd:fp32"),
        ("cpu_simd", "bf16", "cpu_simd"),
    ],
)
def test_experts_on_the_host_keep_the_precision_that_the_plan_gives_them(
    plan: str, precision: str, expected: str
) -> None:
    pytest.importorskip("lfm2kit_cpu_simd", reason="it has several precisions")
    setup = set_up(RANDOM, Options(backend=plan, precision=precision, n_cpu_moe=1))
    leaves = {leaf.name: leaf.backend for leaf in setup.placed.leaves()}
    experts = {name: leaf for name, leaf in leaves.items() if name.startswith("layers.2.feed")}
    assert set(experts.values()) == {expected}


def test_without_such_a_backend_the_option_is_named() -> None:
    plugins = Plugins([])
    plugin = BackendPlugin("mine", "", lambda context: DeviceBackend(), 1, preference=1)
    plugins.backends["mine"] = InstalledBackend(plugin, "this test")
    with pytest.raises(Lfm2kitError, match="n_cpu_moe=1: no backend that can run here builds Exp"):
        set_up(RANDOM, Options(backend="mine", n_cpu_moe=1), plugins=plugins)


def test_reference_alone_is_enough() -> None:
    only = Plugins([EntryPoint("reference", "lfm2kit.reference", "lfm2kit")])
    assert experts_of_layer_2(only) == "reference"
