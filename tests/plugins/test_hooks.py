"""What each hook does, through `Plugins`: one plugin per test, an entry point by its value."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

import lfm2kit
from lfm2kit.backend import HOST, BackendPlugin, Batch, Block, Context
from lfm2kit.building.loading import Setup, find_model, set_up
from lfm2kit.building.options import Options
from lfm2kit.building.placement import Placed
from lfm2kit.building.plugins import COMMANDS, InstalledBackend, Plugins, installed_plugins
from lfm2kit.building.wrappers import Wrappers
from lfm2kit.checkpoint import Checkpoint, map_file, open_checkpoint
from lfm2kit.checkpoint.readers import CheckpointReader
from lfm2kit.cli import own_commands
from lfm2kit.errors import Option
from lfm2kit.precisions import BF16_GRADE, FP16_GRADE, FP32_GRADE, Precision
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.specs import MLP, LMHead, Spec
from lfm2kit.transport import Transport, World
from lfm2kit.weights import Weights
from tests.checkpoint.typed import Cli, Typed
from tests.random_model import RANDOM

Load = Callable[..., Plugins]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Load plugins of a module per hook, in this order, as `plugin_0`, `plugin_1` and so on."""

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
            return ReferenceBackend()

        yield BackendPlugin("mine", "a line", create, api_version=1)
        yield BackendPlugin("other", "a line", lambda context: ReferenceBackend(), api_version=1)

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
            "mine",
            "a line",
            lambda context: ReferenceBackend(),
            1,
            why_unavailable=lambda: "no such chip",
        )

    with pytest.raises(lfm2kit.Lfm2kitError, match="cannot run here: no such chip"):
        load(lfm2kit_backends).creator(Context())("mine")


def test_lfm2kit_backends_are_picked_by_auto_only_if_preferred_and_able(load: Load) -> None:
    @lfm2kit.hookimpl
    def lfm2kit_backends() -> Iterator[BackendPlugin]:
        def announced(name: str, preference: int, **more: Any) -> BackendPlugin:
            return BackendPlugin(
                name, "", lambda context: ReferenceBackend(), 1, preference=preference, **more
            )

        yield announced("slow", 1)
        yield announced("never", 0)
        yield announced("fast", 5)
        yield announced("faster", 9, why_unavailable=lambda: "no such chip")
        yield announced("half", 7, precisions=(Precision("fp16", FP16_GRADE),))

    plugins = load(lfm2kit_backends)
    assert plugins.auto() == "fast"
    assert plugins.auto("fp16") == "half"
    with pytest.raises(lfm2kit.Lfm2kitError, match="no backend for precision int3"):
        plugins.auto("int3")
    with pytest.raises(lfm2kit.Lfm2kitError, match="no precision fp16; available: fp32"):
        plugins.creator(Context(precision="fp16"))("fast")


def test_lfm2kit_backends_are_created_once_in_each_precision(load: Load) -> None:
    """An item's own precision reaches the backends that its backend is made of."""
    made: list[str] = []

    @lfm2kit.hookimpl
    def lfm2kit_backends() -> Iterator[BackendPlugin]:
        both = (Precision("fp32", FP32_GRADE), Precision("int4", BF16_GRADE))

        def inner(context: Context) -> Any:
            made.append(f"inner {context.precision}")
            return ReferenceBackend()

        yield BackendPlugin("inner", "", inner, 1, precisions=both)
        yield BackendPlugin("outer", "", lambda c: c.create_backend("inner"), 1, precisions=both)

    create = load(lfm2kit_backends).creator(Context())
    assert create("outer") is create("inner") is create("inner:fp32") is create("outer:fp32")
    assert create("outer:int4") is create("inner:int4")
    assert made == ["inner fp32", "inner int4"]
    with pytest.raises(lfm2kit.Lfm2kitError, match="'inner' has no precision fp8; available: fp32"):
        create("inner:fp8")
    with pytest.raises(lfm2kit.Lfm2kitError, match=r"no precision fp8; .*, write inner:fp32"):
        load(lfm2kit_backends).creator(Context("fp8"))("inner")


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


def recording(mark: str, *, survives: bool = False) -> Any:
    """Return a plugin's hook that wraps every MLP, and leaves a mark in what it returns."""

    @lfm2kit.hookimpl
    def lfm2kit_block_wrapper(name: str, spec: Spec) -> Any:
        def wrap(block: Block) -> Block:
            return lambda *inputs: f"{mark} {name} ({block(*inputs)})"

        return lfm2kit.Wrapper(wrap, survives) if spec.kind == "mlp" else None

    return lfm2kit_block_wrapper


def identity(x: Any) -> Any:
    return x


def placed(spec: Spec, name: str) -> Placed:
    return Placed(name, name, spec, HOST, HOST, "reference")


def test_lfm2kit_block_wrapper_wraps_the_blocks_it_chooses_later_plugins_outermost(
    load: Load,
) -> None:
    plugins = load(recording("inner"), recording("outer"))
    head, mlp = placed(LMHead(5, 2), "lm_head"), placed(MLP(2, 3), "layers.0.feed_forward")
    assert Wrappers.of(head, plugins).wrap(head.name, head.spec, identity) is identity
    wrapped = Wrappers.of(mlp, plugins).wrap(mlp.name, mlp.spec, identity)
    assert wrapped("x") == "outer layers.0.feed_forward (inner layers.0.feed_forward (x))"


def test_lfm2kit_block_wrapper_is_told_the_memory_of_the_block(load: Load) -> None:
    told: list[Any] = []

    @lfm2kit.hookimpl
    def lfm2kit_block_wrapper(name: str, spec: Spec, memory: Any) -> None:
        told.append((name, memory))

    Wrappers.of(placed(MLP(2, 3), "layers.0.feed_forward"), load(lfm2kit_block_wrapper))
    assert told == [("layers.0.feed_forward", HOST)]


@pytest.mark.parametrize("returned", [identity, "wrap", lfm2kit.Wrapper])
def test_a_wrapper_of_another_type_is_an_error_that_names_the_plugin(
    load: Load, returned: Any
) -> None:
    @lfm2kit.hookimpl
    def lfm2kit_block_wrapper(name: str, spec: Spec) -> Any:
        return returned

    sentence = r"of plugin 'plugin_0', asked about lm_head, returned .*, not an lfm2kit.Wrapper"
    with pytest.raises(lfm2kit.Lfm2kitError, match=sentence):
        Wrappers.of(placed(LMHead(5, 2), "lm_head"), load(lfm2kit_block_wrapper))


class Capturing(ReferenceBackend):
    """A backend that captures forwards; its replays only call them."""

    captured = 0

    def capture(self, forward: Any, batch: Batch) -> Any:
        Capturing.captured += 1

        class Replay:
            nbytes = 0

            def __call__(self, batch: Batch) -> Any:
                return forward(batch)

            def close(self) -> None:
                pass

        return Replay()


def wrapped_setup(load: Load, *hooks: Any) -> Setup:
    """Set up the embedded model on a backend that captures, with the hooks of some plugins."""
    plugins = load(*hooks)
    plugin = BackendPlugin("capturing", "", lambda context: Capturing(), 1)
    plugins.backends["capturing"] = InstalledBackend(plugin, "this test")
    tiny = RANDOM
    return set_up(tiny, Options(backend="capturing"), plugins=plugins)


def is_captured(setup: Setup) -> bool:
    before, model = Capturing.captured, setup.build()
    for _ in range(3):
        model.logits(Batch.of_sequences([[1, 2, 3]]))
    return Capturing.captured > before


def transparent(survives: bool) -> Any:
    """Return a plugin's hook that wraps all layers and changes nothing."""

    @lfm2kit.hookimpl
    def lfm2kit_block_wrapper(name: str, spec: Spec) -> Any:
        wrapper = lfm2kit.Wrapper(lambda block: lambda *inputs: block(*inputs), survives)
        return wrapper if spec.kind == "layer" else None

    return lfm2kit_block_wrapper


def test_a_model_in_a_wrapper_that_does_not_survive_capture_is_not_captured(load: Load) -> None:
    setup = wrapped_setup(load, transparent(True), transparent(False))
    assert list(setup.notes()) == ["not captured: plugin 'plugin_1' wraps layers.0 and 7 more"]
    assert not is_captured(setup)


def test_a_model_in_wrappers_that_survive_capture_is_captured(load: Load) -> None:
    setup = wrapped_setup(load, transparent(True))
    assert list(setup.notes()) == []
    assert is_captured(setup)


class Objecting(ReferenceBackend):
    """A backend whose dense feed-forwards do something that a replay would not do."""

    def why_not_captured(self, spec: Spec) -> str | None:
        return "it counts calls" if isinstance(spec, MLP) else None


@pytest.mark.parametrize("plan", ["capturing,ffn=objecting", "capturing,norm=objecting"])
def test_a_model_is_captured_unless_a_backend_objects(load: Load, plan: str) -> None:
    plugins = load()
    for name, backend in {"capturing": Capturing, "objecting": Objecting}.items():
        plugin = BackendPlugin(name, "", lambda context, backend=backend: backend(), 1)
        plugins.backends[name] = InstalledBackend(plugin, "this test")
    setup = set_up(RANDOM, Options(backend=plan), plugins=plugins)
    objects = "ffn=" in plan
    sentence = "not captured: objecting builds layers.0.feed_forward and 1 more: it counts calls"
    assert list(setup.notes()) == [sentence] * objects
    assert is_captured(setup) is not objects


def test_where_nothing_is_captured_a_wrapper_prevents_nothing(load: Load) -> None:
    plugins = load(transparent(False))
    reference = installed_plugins().backends["reference"]
    plugins.backends["reference"] = reference
    tiny = RANDOM
    assert list(set_up(tiny, Options(backend="reference"), plugins=plugins).notes()) == []


# ---- commands ----


def announcing(*commands: lfm2kit.Command) -> Any:
    @lfm2kit.hookimpl
    def lfm2kit_commands() -> Any:
        yield from commands

    return lfm2kit_commands


@pytest.fixture
def cli_with(
    load: Load, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> Callable[[lfm2kit.Command], Cli]:
    """Return the command line with a command of a plugin."""

    def installed(command: lfm2kit.Command) -> Cli:
        plugins = load(announcing(command))
        module = sys.modules["lfm2kit.cli.plugin_commands"]
        monkeypatch.setattr(module, "installed_plugins", lambda: plugins)
        return cli

    return installed


def hello(name: str, times: int = 1) -> None:
    """Greet somebody."""
    if times == 0:
        raise lfm2kit.Lfm2kitError("not at all, ", Option("times", 0))
    print("hello", name * times)


def test_lfm2kit_commands_run_with_the_arguments_of_their_function(cli_with: Any) -> None:
    cli = cli_with(lfm2kit.Command("hello", hello))
    assert cli("hello", "you", "--times", 2).out == "hello youyou\n"
    assert "Greet somebody" in cli("--help").out
    assert "--times" in cli("hello", "-h").out
    cli("hello", "you", "--times", 0).assert_fails("not at all, --times 0")
    cli("hello").assert_fails("Missing argument 'name'", "see lfm2kit hello --help")
    cli("helo").assert_fails("Did you mean 'hello'?")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (SystemExit(), 0, ""),
        (SystemExit(0), 0, ""),
        (SystemExit(9), 9, ""),
        (SystemExit("sorry"), 1, "lfm2kit: error: sorry\n"),
        (typer.Exit(4), 4, ""),
        (typer.Abort(), 1, "lfm2kit: error: aborted\n"),
    ],
)
def test_a_command_ends_with_its_own_exit_code(
    cli_with: Any, error: BaseException, code: int, said: str
) -> None:
    def leave() -> None:
        print("done")
        raise error

    left = cli_with(lfm2kit.Command("leave", leave))("leave")
    assert (left.code, left.out, left.err) == (code, "done\n", said)


def test_a_command_that_typer_cannot_read_breaks_no_help(cli_with: Any) -> None:
    def odd(value: Any) -> None:
        """Greet nobody, because it never runs."""

    odd.__annotations__["value"] = "NoSuchType"

    cli = cli_with(lfm2kit.Command("odd", odd))
    assert "Cannot be used" in cli("--help").out
    cli("odd").assert_fails("command 'odd' of unknown cannot be used: ")


def test_a_plugin_that_was_skipped_is_named_where_a_name_is_not_there(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Plugins([EntryPoint("odd", "a_module_that_is_not_there", "lfm2kit")])
    broken.backends["reference"] = installed_plugins().backends["reference"]
    for name in ("building.loading", "cli.plugin_commands", "cli.options", "ranks.shares"):
        monkeypatch.setattr(sys.modules[f"lfm2kit.{name}"], "installed_plugins", lambda: broken)
    skipped = "; skipped as broken: plugin 'odd' (ModuleNotFoundError: No module named"
    cli("helo").assert_fails("No such command 'helo'", skipped)
    cli("plan", "-b", "mine").assert_fails("unknown backend 'mine'", skipped)
    cli("plan", "--rewrite", "x").assert_fails("unknown rewrite 'x'; available: trim", skipped)


def test_no_plugin_is_loaded_for_a_command_of_lfm2kit(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        raise AssertionError("plugins are loaded")

    monkeypatch.setattr(sys.modules["lfm2kit.cli.plugin_commands"], "installed_plugins", fails)
    assert cli("specs", "tiny").code == 0


def test_the_names_of_lfm2kits_commands_are_those_of_the_command_line() -> None:
    assert set(own_commands.NAMES) == COMMANDS
    for name in COMMANDS:
        assert own_commands.built(name).name == name


# ---- the end of a run ----


@pytest.fixture
def run_with(load: Load, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Typed]:
    """Run `lfm2kit run` with plugins that are told of its end."""

    def run(*functions: Callable[[Any], None], words: tuple[object, ...] = ()) -> Typed:
        hooks = []
        for function in functions:

            def lfm2kit_run_ended(record: Any, function: Any = function) -> None:
                function(record)

            hooks.append(lfm2kit.hookimpl(lfm2kit_run_ended))
        plugins = load(*hooks)
        plugins.backends["reference"] = installed_plugins().backends["reference"]
        loading = sys.modules["lfm2kit.building.loading"]
        monkeypatch.setattr(loading, "installed_plugins", lambda: plugins)
        return cli("run", "-b", "reference", "-n", 1, "-v", *words)

    return run


def test_lfm2kit_run_ended_gets_what_json_writes(run_with: Any, tmp_path: Path) -> None:
    records: list[Any] = []
    path = tmp_path / "record.json"
    done = run_with(records.append, records.append, words=("--json", path))
    assert done.code == 0, done
    assert records == [json.loads(path.read_text())] * 2
    assert records[0] is not records[1]


def test_a_plugin_that_fails_at_the_end_loses_nothing(run_with: Any, tmp_path: Path) -> None:
    told: list[Any] = []

    def fails(record: Any) -> None:
        record.clear()
        raise KeyError("seconds")

    def refuses(record: Any) -> None:
        raise lfm2kit.Lfm2kitError("no room for ", Option("outputs", "x"))

    def leaves(record: Any) -> None:
        sys.exit(0)

    outputs, path = tmp_path / "outputs.bin", tmp_path / "record.json"
    words = ("--json", path, "--outputs", outputs)
    done = run_with(fails, refuses, leaves, told.append, words=words)
    assert "VALID" in done.out.splitlines()
    assert told == [json.loads(path.read_text())]
    assert outputs.exists()
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert "plugin 'plugin_0' failed after the run: KeyError: 'seconds'" in line
    assert "; plugin 'plugin_1' failed after the run: no room for --outputs x; plugin" in line
    assert "'plugin_2' failed after the run: RuntimeError: SystemExit: 0" in line


def test_a_wrong_result_stays_the_worse_news(run_with: Any, tmp_path: Path) -> None:
    def fails(record: Any) -> None:
        assert record["validation"]["valid"] is False
        raise KeyError("seconds")

    (tmp_path / "answers.bin").write_bytes(b"")
    done = run_with(fails, words=("--answers", tmp_path / "answers.bin"))
    assert (done.code, "INVALID" in done.out.splitlines()) == (1, True)
    assert "failed after the run" in done.err


# ---- readers of checkpoints ----


def claims(name: str, claimed: Path, open_it: Any = lambda path: None) -> Any:
    """Return a plugin with a reader `name` of one path."""

    @lfm2kit.hookimpl
    def lfm2kit_checkpoints() -> Iterator[CheckpointReader]:
        yield CheckpointReader(name, "a line", lambda path: path == claimed, open_it)

    return lfm2kit_checkpoints


def opened(plugins: Plugins, path: Path) -> Checkpoint:
    return open_checkpoint(path, plugins.readers.values())


def tiny_at(path: Path) -> Checkpoint:
    return replace(RANDOM, path=path)


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
