"""Plugins as they are installed: found by their entry points, kept apart where they are broken."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib import invalidate_caches
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import pytest

from lfm2kit.building.loading import set_up
from lfm2kit.building.options import Options
from lfm2kit.building.plugins import GROUP, Plugins
from lfm2kit.errors import Lfm2kitError
from tests.checkpoint.typed import Cli, Typed
from tests.plugins.distributions import added, announcing, environment, install, lfm2kit, listing
from tests.random_model import RANDOM

ABSENT_IMPORT = "import a_module_that_is_not_there"
EXITS = "import sys; sys.exit('no licence')"
MISSPELT = """
    import lfm2kit

    @lfm2kit.hookimpl
    def lfm2kit_backend():
        yield
"""
WRONG_ARGUMENT = """
    import lfm2kit

    @lfm2kit.hookimpl
    def lfm2kit_block_wrapper(name, spek):
        return None
"""
YIELDS_NONSENSE = """
    import lfm2kit

    @lfm2kit.hookimpl
    def lfm2kit_backends():
        yield "odd"
"""
YIELDS_NO_TRANSPORT = """
    import lfm2kit

    @lfm2kit.hookimpl
    def lfm2kit_transports():
        yield 7
"""
RAISES_IN_HOOK = """
    import lfm2kit

    @lfm2kit.hookimpl
    def lfm2kit_backends():
        raise RuntimeError("first line\\nsecond line")
"""
A_NAME_AS_PRECISION = """
    import lfm2kit

    @lfm2kit.hookimpl
    def lfm2kit_backends():
        yield lfm2kit.BackendPlugin("odd", "", lambda context: None, 1, precisions=("fp32",))
"""
SHADOWS = """
    import lfm2kit

    @lfm2kit.hookimpl
    def lfm2kit_commands():
        yield lfm2kit.Command("run", lambda: print("VALID"))
"""
GREETS = """
    import lfm2kit

    def hello(name: str) -> None:
        print("hello", name, "from {name}")

    @lfm2kit.hookimpl
    def lfm2kit_commands():
        yield lfm2kit.Command("hello", hello)
"""
YIELDS_NOTHING = """
    import lfm2kit

    @lfm2kit.hookimpl
    def lfm2kit_backends():
        return []

    @lfm2kit.hookimpl
    def lfm2kit_commands():
        yield from ()
"""
ACTS_LATER = """
    import lfm2kit

    @lfm2kit.hookimpl
    def lfm2kit_run_ended(record):
        pass
"""
UNMARKED = """
    def lfm2kit_backends():
        return []
"""
FAILS_WHEN_CREATED = """
    import lfm2kit

    @lfm2kit.hookimpl
    def lfm2kit_backends():
        def create(context):
            raise {error}
        yield lfm2kit.BackendPlugin("odd", "fails", create, api_version=1)
"""
OLD_API = """
    import lfm2kit

    @lfm2kit.hookimpl
    def lfm2kit_backends():
        def create(context):
            raise AssertionError("created, though written for another API")
        yield lfm2kit.BackendPlugin("odd", "from the future", create, api_version=99)
"""


def test_a_backend_is_found_by_its_entry_point_and_runs(tmp_path: Path) -> None:
    install(tmp_path, "mine", announcing("mine"))
    row = listing(tmp_path)["mine"]
    assert (row["package"], row["version"]) == ("lfm2kit-mine", "1.0")
    assert (row["folder"], row["editable"]) == (str(tmp_path), False)
    assert (row["hooks"], row["not_used"]) == (["lfm2kit_backends"], None)
    summary = {"kind": "backend", "name": "mine", "summary": "a twin of reference"}
    assert row["adds"] == [{**summary, "api_version": 1, "cannot_run": None}]
    run = lfm2kit(tmp_path, "run", "--backend", "mine", "-n", "2", "-v")
    assert (run.returncode, "\nVALID\n" in run.stdout) == (0, True), run.stderr


class Here:
    """A runner of commands in this process, which finds the distributions in a folder."""

    def __init__(self, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cli = cli
        self.monkeypatch = monkeypatch

    def __call__(self, *words: str, **variables: str) -> Typed:
        invalidate_caches()
        with self.monkeypatch.context() as during:
            for name, value in variables.items():
                during.setenv(name, value)
            return self.cli(*words)

    def listing(self, **variables: str) -> dict[str, Any]:
        """Return what `lfm2kit plugins` says of each plugin, by its name."""
        done = self("plugins", "--json", "-", **variables)
        assert done.code == 0, done.err
        return {row["name"]: row for row in json.loads(done.out)["plugins"]}


@pytest.fixture
def here(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Iterator[Here]:
    """Find what is in `tmp_path`, and forget afterwards what was imported from there."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield Here(cli, monkeypatch)
    for name in {one for one in sys.modules if one.startswith("lfm2kit_")} - before:
        if Path(str(sys.modules[name].__file__)).is_relative_to(tmp_path):
            del sys.modules[name]


def test_an_editable_plugin_is_in_its_project_and_not_in_the_environment(
    tmp_path: Path, here: Here
) -> None:
    install(tmp_path, "mine", announcing("mine"))
    origin = {"url": (tmp_path / "a project").as_uri(), "dir_info": {"editable": True}}
    written = tmp_path / "lfm2kit_mine-1.0.dist-info" / "direct_url.json"
    written.write_text(json.dumps(origin))
    row = here.listing()["mine"]
    assert (row["folder"], row["editable"]) == (str(tmp_path / "a project"), True)
    written.write_text("[]")
    row = here.listing()["mine"]
    assert (row["folder"], row["editable"]) == (str(tmp_path), False)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (ABSENT_IMPORT, "No module named 'a_module_that_is_not_there'"),
        (EXITS, "SystemExit: no licence"),
        (MISSPELT, "'lfm2kit_backend' does not exist"),
        (WRONG_ARGUMENT, "PluginValidationError"),
        (YIELDS_NONSENSE, "yielded 'odd', not a BackendPlugin"),
        (YIELDS_NO_TRANSPORT, "yielded 7, not a TransportPlugin"),
        (RAISES_IN_HOOK, "RuntimeError: first line"),
        (A_NAME_AS_PRECISION, "announces the precision 'fp32'; write Precision("),
        (SHADOWS, "lfm2kit_commands yielded 'run', which is lfm2kit's"),
        (UNMARKED, "'lfm2kit_backends' is not marked with @lfm2kit.hookimpl"),
    ],
)
def test_a_broken_plugin_is_listed_with_its_traceback_and_harms_no_other(
    tmp_path: Path, here: Here, source: str, reason: str
) -> None:
    install(tmp_path, "odd", source)
    install(tmp_path, "mine", announcing("mine"))
    listed = here.listing()
    assert [name for name, row in listed.items() if row["not_used"]] == ["odd"]
    broken = listed["odd"]
    assert reason in broken["not_used"]
    assert "\n" not in broken["not_used"]
    assert (broken["package"], broken["version"]) == ("lfm2kit-odd", "1.0")
    assert broken["traceback"].startswith("Traceback")
    assert broken["adds"] == []
    assert {"mine", "reference"} <= set(added(listed, "backend"))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("", "none of its functions is marked with @lfm2kit.hookimpl"),
        (YIELDS_NOTHING, "lfm2kit_backends and lfm2kit_commands yielded nothing"),
    ],
)
def test_a_plugin_that_adds_nothing_is_named(
    tmp_path: Path, here: Here, source: str, reason: str
) -> None:
    install(tmp_path, "odd", source)
    install(tmp_path, "later", ACTS_LATER)
    rows = here.listing().values()
    unused = [(row["name"], row["not_used"], row["traceback"]) for row in rows if row["not_used"]]
    assert unused == [("odd", reason, None)]
    done = here("backends", "check", "odd")
    assert (done.code, done.out) == (2, "")
    says = f"; without any addition: plugin 'odd' ({reason}); see lfm2kit plugins\n"
    assert done.err.endswith(says)
    says = "plugin 'odd' is not used; see lfm2kit plugins\n"
    assert here("backends").out.endswith(says)


def test_a_misspelt_hook_is_named_with_the_nearest_one(tmp_path: Path, here: Here) -> None:
    install(tmp_path, "odd", MISSPELT)
    reason = here.listing()["odd"]["not_used"]
    assert "Did you mean 'lfm2kit_backends'?" in reason


def test_a_wrong_argument_name_is_shown_in_the_traceback(tmp_path: Path, here: Here) -> None:
    install(tmp_path, "odd", WRONG_ARGUMENT)
    assert "spek" in here.listing()["odd"]["traceback"]


def test_another_api_version_is_listed_with_both_numbers_and_never_created(
    tmp_path: Path, here: Here
) -> None:
    install(tmp_path, "odd", OLD_API)
    row = added(here.listing(), "backend")["odd"]
    assert row["api_version"] == 99
    assert "99" in row["cannot_run"]
    assert "this lfm2kit has 1" in row["cannot_run"]
    run = here("run", "--backend", "odd", "-n", "1")
    assert run.code == 2
    assert "backend API 99" in run.err
    assert "Traceback" not in run.err


@pytest.mark.parametrize(
    "error", ["TypeError('no such chip')", "SystemExit('no licence')", "ImportError('no driver')"]
)
def test_a_backend_that_cannot_be_created_is_one_line_and_a_traceback_on_request(
    tmp_path: Path, here: Here, error: str
) -> None:
    install(tmp_path, "odd", FAILS_WHEN_CREATED.format(error=error))
    run = here("run", "--backend", "odd", "-n", "1")
    kind = error.partition("(")[0]
    assert run.code == 2
    assert f"create() of backend 'odd' of lfm2kit-odd 1.0 raised {kind}: no" in run.err
    assert run.err.count("\n") == 1
    traced = here("run", "--backend", "odd", "-n", "1", LFM2KIT_TRACEBACK="1")
    assert (traced.code, "in create" in traced.err) == (2, True)


def test_of_two_backends_of_one_name_the_second_is_refused_and_the_first_named(
    tmp_path: Path,
    here: Here,
) -> None:
    install(tmp_path, "one", announcing("same"))
    install(tmp_path, "two", announcing("same"))
    listed = here.listing()
    assert added(listed, "backend")["same"]["plugin"] == "one"
    assert "'same', which is lfm2kit-one 1.0's" in listed["two"]["not_used"]


def test_of_two_commands_of_one_name_the_second_is_refused_and_the_first_runs(
    tmp_path: Path,
    here: Here,
) -> None:
    install(tmp_path, "one", GREETS.format(name="one"))
    install(tmp_path, "two", GREETS.format(name="two"))
    done = here("hello", "you")
    assert (done.code, done.out) == (0, "hello you from one\n"), done.err
    listed = here.listing()
    assert added(listed, "command")["hello"]["plugin"] == "one"
    assert "'hello', which is lfm2kit-one 1.0's" in listed["two"]["not_used"]


def test_no_plugin_can_take_the_name_of_a_backend_of_ours(tmp_path: Path, here: Here) -> None:
    install(tmp_path, "zealous", announcing("reference"))
    listed = here.listing()
    assert added(listed, "backend")["reference"]["plugin"] == "reference"
    assert "'reference', which is lfm2kit " in listed["zealous"]["not_used"]


@pytest.mark.parametrize(
    ("allowed", "expected"),
    [
        ("mine,reference", {"mine", "reference"}),
        (" mine , ", {"mine"}),
        ("none", set()),
        ("", set()),
    ],
)
def test_the_allow_list_alone_says_what_is_loaded(
    tmp_path: Path, here: Here, allowed: str, expected: set[str]
) -> None:
    install(tmp_path, "mine", announcing("mine"))
    install(tmp_path, "odd", EXITS)
    listed = here.listing(LFM2KIT_PLUGINS=allowed)
    assert {name for name, row in listed.items() if row["not_used"] is None} == expected
    assert set(added(listed, "backend")) == expected
    assert listed["odd"]["not_used"] == "LFM2KIT_PLUGINS does not name it"


def test_an_unknown_name_in_the_allow_list_is_an_error_with_the_nearest(
    tmp_path: Path, here: Here
) -> None:
    install(tmp_path, "mine", announcing("mine"))
    done = here("backends", LFM2KIT_PLUGINS="reference,mien")
    assert done.code == 2
    assert "LFM2KIT_PLUGINS names 'mien'" in done.err
    assert "Did you mean 'mine'?" in done.err
    assert "Traceback" not in done.err


def test_listing_plugins_imports_no_compiler_no_device_and_no_mpi(tmp_path: Path) -> None:
    """All plugins of this environment, whichever they are: importing one must be free."""
    code = """
import sys, lfm2kit
from lfm2kit.building.plugins import installed_plugins
installed_plugins()
print(sorted({"numba", "cupy", "mpi4py", "torch", "transformers"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(tmp_path), capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


@pytest.mark.parametrize("name", ["odd", "other"])
def test_an_unknown_backend_or_rewrite_may_be_one_of_a_plugin_that_was_skipped(name: str) -> None:
    """A rewrite may have another name than the entry point of its plugin."""
    ours = [entry for entry in entry_points(group=GROUP) if entry.name == "reference"]
    plugins = Plugins([*ours, EntryPoint("odd", "absent", GROUP)])
    checkpoint = RANDOM
    for options in (Options(rewrites=(name,), backend="reference"), Options(backend=name)):
        with pytest.raises(Lfm2kitError) as raised:
            set_up(checkpoint, options, plugins=plugins)
        assert str(raised.value).startswith("unknown ")
        assert "; skipped as broken: plugin 'odd' (ModuleNotFoundError" in str(raised.value)
