"""What each hook does, through `Plugins`: one plugin per test, an entry point by its value."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any

import pytest

import lfm2kit
from lfm2kit.backend import BackendPlugin, Block, Context
from lfm2kit.plugins import Plugins
from lfm2kit.specs import MLP, LMHead, Spec
from lfm2kit.transport import Transport, World

Load = Callable[..., Plugins]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Plugins of a module per hook, in this order: the entry points `plugin_0`, `plugin_1`."""

    def loaded(*hooks: Any) -> Plugins:
        entries = []
        for i, hook in enumerate(hooks):
            module = ModuleType(f"plugin_{i}")
            setattr(module, hook.__name__, hook)
            monkeypatch.setitem(sys.modules, module.__name__, module)
            entries.append(EntryPoint(module.__name__, module.__name__, "lfm2kit"))
        plugins = Plugins(entries)
        assert plugins.broken == []
        return plugins

    return loaded


def test_lfm2kit_backends_are_created_once_by_name_with_the_runs_context(load: Load) -> None:
    contexts: list[Context] = []

    @lfm2kit.hookimpl
    def lfm2kit_backends() -> Iterator[BackendPlugin]:
        def create(context: Context) -> Any:
            contexts.append(context)
            return object()

        yield BackendPlugin("mine", "a line", create, api_version=1)
        yield BackendPlugin("other", "a line", lambda context: object(), api_version=1)

    create = load(lfm2kit_backends).creator(Context(threads=3))
    mine = create("mine")
    assert create("mine") is mine
    (context,) = contexts
    assert context.threads == 3
    assert context.create_backend("other") is create("other")


def test_lfm2kit_backends_that_say_why_they_cannot_run_are_refused_with_it(load: Load) -> None:
    @lfm2kit.hookimpl
    def lfm2kit_backends() -> Iterator[BackendPlugin]:
        yield BackendPlugin(
            "mine", "a line", lambda context: object(), 1, why_unavailable=lambda: "no such chip"
        )

    with pytest.raises(lfm2kit.Lfm2kitError, match="cannot run here: no such chip"):
        load(lfm2kit_backends).creator(Context())("mine")


def test_lfm2kit_backends_are_picked_by_auto_only_if_preferred_and_able(load: Load) -> None:
    @lfm2kit.hookimpl
    def lfm2kit_backends() -> Iterator[BackendPlugin]:
        def announced(name: str, preference: int, **more: Any) -> BackendPlugin:
            return BackendPlugin(
                name, "", lambda context: object(), 1, preference=preference, **more
            )

        yield announced("slow", 1)
        yield announced("never", 0)
        yield announced("fast", 5)
        yield announced("faster", 9, why_unavailable=lambda: "no such chip")
        yield announced("half", 7, precisions=("fp16",))

    plugins = load(lfm2kit_backends)
    assert plugins.auto() == "fast"
    assert plugins.auto("fp16") == "half"
    with pytest.raises(lfm2kit.Lfm2kitError, match="no backend for precision int3"):
        plugins.auto("int3")
    with pytest.raises(lfm2kit.Lfm2kitError, match="no precision fp16; there is: fp32"):
        plugins.creator(Context(precision="fp16"))("fast")


def test_lfm2kit_transports_are_found_by_name(load: Load) -> None:
    class Launcher:
        def world_size(self) -> int | None:
            return None

        def launch(self, ranks: int, arguments: Any) -> int:
            return 0

        def connect(self) -> Any:
            raise NotImplementedError

    launcher = Launcher()

    @lfm2kit.hookimpl
    def lfm2kit_transports() -> Iterator[lfm2kit.TransportPlugin]:
        yield lfm2kit.TransportPlugin("pigeon", "slow but sure", launcher)

    plugins = load(lfm2kit_transports)
    assert plugins.transports["pigeon"].launcher is launcher


def test_lfm2kit_rewrites_are_found_by_name_and_learn_their_place_in_the_job(load: Load) -> None:
    def rewrite(name: str) -> lfm2kit.Rewrite:
        return lfm2kit.Rewrite(name, "a line", lambda model: model)

    @lfm2kit.hookimpl
    def lfm2kit_rewrites(world: World, transport: Transport | None) -> Iterator[lfm2kit.Rewrite]:
        yield rewrite("mine")
        if world.size > 1 and transport is None:
            yield rewrite("ours")

    plugins = load(lfm2kit_rewrites)
    assert list(plugins.rewrites()) == ["trim", "mine"]
    assert list(plugins.rewrites(World(0, 2))) == ["trim", "experts-over-ranks", "mine", "ours"]


def test_lfm2kit_block_wrapper_wraps_the_blocks_it_chooses_later_plugins_outermost(
    load: Load,
) -> None:
    def recording(mark: str) -> Any:
        @lfm2kit.hookimpl
        def lfm2kit_block_wrapper(name: str, spec: Spec) -> Any:
            if spec.kind != "mlp":
                return None

            def wrap(block: Block) -> Block:
                return lambda *inputs: f"{mark} {name} ({block(*inputs)})"

            return wrap

        return lfm2kit_block_wrapper

    plugins = load(recording("inner"), recording("outer"))

    def block(x: str) -> str:
        return x

    assert plugins.wrap("lm_head", LMHead(5, 2), block) is block
    wrapped = plugins.wrap("layers.0.feed_forward", MLP(2, 3), block)
    assert wrapped("x") == "outer layers.0.feed_forward (inner layers.0.feed_forward (x))"
