"""What each hook does, through `Plugins`: one plugin per test, an entry point by its value."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import lfm2kit
from lfm2kit.backend import BackendPlugin, Block, Context
from lfm2kit.checkpoint import Checkpoint, map_file, open_checkpoint
from lfm2kit.loading import find_model
from lfm2kit.plugins import Plugins
from lfm2kit.precisions import FP32_GRADE, SIXTEEN_BIT, Precision
from lfm2kit.readers import CheckpointReader
from lfm2kit.specs import MLP, LMHead, Spec
from lfm2kit.weights import Weights

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
        yield announced("half", 7, precisions=(Precision("fp16", SIXTEEN_BIT),))

    plugins = load(lfm2kit_backends)
    assert plugins.auto() == "fast"
    assert plugins.auto("fp16") == "half"
    with pytest.raises(lfm2kit.Lfm2kitError, match="no backend for precision int3"):
        plugins.auto("int3")
    with pytest.raises(lfm2kit.Lfm2kitError, match="no precision fp16; there is: fp32"):
        plugins.creator(Context(precision="fp16"))("fast")


def test_lfm2kit_backends_are_created_once_in_each_precision(load: Load) -> None:
    """An item's own precision reaches the backends that its backend is made of."""
    made: list[str] = []

    @lfm2kit.hookimpl
    def lfm2kit_backends() -> Iterator[BackendPlugin]:
        both = (Precision("fp32", FP32_GRADE), Precision("int4", SIXTEEN_BIT))

        def inner(context: Context) -> Any:
            made.append(f"inner {context.precision}")
            return object()

        yield BackendPlugin("inner", "", inner, 1, precisions=both)
        yield BackendPlugin("outer", "", lambda c: c.create_backend("inner"), 1, precisions=both)

    create = load(lfm2kit_backends).creator(Context())
    assert create("outer") is create("inner") is create("inner:fp32") is create("outer:fp32")
    assert create("outer:int4") is create("inner:int4")
    assert made == ["inner fp32", "inner int4"]
    with pytest.raises(lfm2kit.Lfm2kitError, match="'inner' has no precision fp8; there is: fp32"):
        create("inner:fp8")


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


def claims(name: str, claimed: Path, open_it: Any = None) -> Any:
    """A plugin with a reader `name` of one path."""

    @lfm2kit.hookimpl
    def lfm2kit_checkpoints() -> Iterator[CheckpointReader]:
        yield CheckpointReader(name, "a line", lambda path: path == claimed, open_it)

    return lfm2kit_checkpoints


def opened(plugins: Plugins, path: Path) -> Checkpoint:
    return open_checkpoint(path, plugins.readers.values())


def tiny_at(path: Path) -> Checkpoint:
    return replace(open_checkpoint(find_model("tiny")), path=path)


def test_lfm2kit_checkpoints_open_what_lfm2kit_cannot(load: Load, tmp_path: Path) -> None:
    """A file that lfm2kit refuses by its first bytes, mapped by the reader."""
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF and so on")

    def open_it(path: Path) -> Checkpoint:
        assert map_file(path)[:4].tobytes() == b"GGUF"
        return tiny_at(path)

    plugins = load(claims("gguf", path, open_it))
    assert opened(plugins, path).path == path
    assert path in opened(plugins, path).files()
    assert opened(plugins, find_model("tiny")).remarks == ()  # and everything else as before
    with pytest.raises(lfm2kit.Lfm2kitError, match="this is a GGUF file"):
        open_checkpoint(path)


def test_lfm2kit_checkpoints_that_take_one_path_are_both_named(load: Load, tmp_path: Path) -> None:
    plugins = load(claims("one", tmp_path), claims("two", tmp_path))
    both = "reader 'one' of unknown and reader 'two' of unknown both take it; LFM2KIT_PLUGINS="
    with pytest.raises(lfm2kit.Lfm2kitError, match=f"^{tmp_path}: {both}"):
        opened(plugins, tmp_path)


def test_lfm2kit_checkpoints_do_not_shadow_what_lfm2kit_reads(load: Load) -> None:
    tiny = find_model("tiny")
    plugins = load(claims("greedy", tiny, tiny_at))
    with pytest.raises(lfm2kit.Lfm2kitError, match=r"reader 'greedy' .* lfm2kit reads it itself"):
        opened(plugins, tiny)


@pytest.mark.parametrize("error", [KeyError("w1"), SystemExit(0), ValueError("two\nlines")])
def test_lfm2kit_checkpoints_that_raise_are_one_line(
    load: Load, tmp_path: Path, error: BaseException
) -> None:
    def raises(path: Path) -> Any:
        raise error

    @lfm2kit.hookimpl
    def lfm2kit_checkpoints() -> Iterator[CheckpointReader]:
        yield CheckpointReader("odd", "a line", raises, raises)

    for plugins in (load(lfm2kit_checkpoints), load(claims("odd", tmp_path, raises))):
        sentence = f"reader 'odd' of unknown raised {type(error).__name__}: "
        with pytest.raises(lfm2kit.Lfm2kitError, match=sentence) as caught:
            opened(plugins, tmp_path)
        assert "\n" not in str(caught.value)
        assert "LFM2KIT_PLUGINS" in str(caught.value)


def test_lfm2kit_checkpoints_keep_to_the_contract(load: Load, tmp_path: Path) -> None:
    """What is opened is a Checkpoint, whose tensors are those of its specs."""
    for wrong, words in (
        (lambda path: {}, "reader 'odd' of unknown returned {}, not a Checkpoint"),
        (lambda path: replace(tiny_at(path), weights=Weights({})), "there is no tensor"),
    ):
        with pytest.raises(lfm2kit.Lfm2kitError, match=words):
            opened(load(claims("odd", tmp_path, wrong)), tmp_path)


def test_lfm2kit_checkpoints_are_asked_of_files_and_folders_alone(
    load: Load, tmp_path: Path
) -> None:
    """A reader would wait for a pipe without end."""
    os.mkfifo(tmp_path / "pipe")
    for path, words in ((tmp_path / "pipe", "this is a pipe"), (tmp_path / "no", "no such file")):
        with pytest.raises(lfm2kit.Lfm2kitError, match=words):
            opened(load(claims("odd", path)), path)
