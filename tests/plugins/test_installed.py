"""What a user has: wheels of lfm2kit and of plugins, in an environment without the checkout."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path

import pytest

from tests.plugins.clean_environment import Installed
from tests.plugins.distributions import build_wheel

pytestmark = pytest.mark.wheels

ROOT = Path(__file__).parents[2]
NAMES = (
    "lfm2kit-blas",
    "lfm2kit-gguf",
    "lfm2kit-int8",
    "lfm2kit-perplexity",
    "lfm2kit-slices",
    "lfm2kit-trace",
)
PROJECTS = {name: ROOT / "plugins" / name for name in NAMES}
BESIDE = {"lfm2kit": ROOT, "lfm2kit-cpu-simd": ROOT / "backends" / "cpu_simd"}  # plugins need them
BEGUN = {"backend": "my-backend", "transport": "post"}  # with `lfm2kit backends new my-backend`


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    into = tmp_path_factory.mktemp("wheels")
    return {name: build_wheel(project, into) for name, project in {**BESIDE, **PROJECTS}.items()}


@pytest.fixture(scope="module")
def installed(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Install the wheels, and those of the packages that the installed lfm2kit begins."""
    folder = tmp_path_factory.mktemp("empty")
    environment = tmp_path_factory.mktemp("environment")
    installed = Installed(environment, folder, "lfm2kit[testing]", *NAMES)
    installed.install(wheels.values())
    for kind, name in BEGUN.items():
        installed.succeeds("lfm2kit", f"{kind}s", "new", name)
    into = tmp_path_factory.mktemp("begun")
    installed.install([build_wheel(folder / f"lfm2kit-{name}", into) for name in BEGUN.values()])
    return installed


def test_wheels_hold_their_package_and_nothing_of_the_checkout_around_it(
    wheels: dict[str, Path],
) -> None:
    tops = {
        name: {Path(entry).parts[0] for entry in zipfile.ZipFile(wheel).namelist()}
        for name, wheel in wheels.items()
    }
    assert tops == {
        "lfm2kit": {"lfm2kit", "lfm2kit-0.1.0.dist-info"},
        "lfm2kit-blas": {"lfm2kit_blas", "lfm2kit_blas-0.1.0.dist-info"},
        "lfm2kit-cpu-simd": {"lfm2kit_cpu_simd", "lfm2kit_cpu_simd-0.1.0.dist-info"},
        "lfm2kit-gguf": {"lfm2kit_gguf", "lfm2kit_gguf-0.1.0.dist-info"},
        "lfm2kit-int8": {"lfm2kit_int8", "lfm2kit_int8-0.1.0.dist-info"},
        "lfm2kit-perplexity": {"lfm2kit_perplexity", "lfm2kit_perplexity-0.1.0.dist-info"},
        "lfm2kit-slices": {"lfm2kit_slices.py", "lfm2kit_slices-0.1.0.dist-info"},
        "lfm2kit-trace": {"lfm2kit_trace", "lfm2kit_trace-0.1.0.dist-info"},
    }


def test_the_installed_core_is_used_and_the_plugins_are_found(installed: Installed) -> None:
    where = installed.succeeds("python", "-c", "import lfm2kit; print(lfm2kit.__file__)")
    assert Path(where).is_relative_to(installed.programs.parent)
    listed = json.loads(installed.succeeds("lfm2kit", "backends", "--json", "-"))
    backends = {row["name"]: row for row in listed["backends"]}
    assert set(backends) == {"reference", "blas", "cpu_simd", "int8", "my-backend"}
    assert backends["blas"]["distribution"] == "lfm2kit-blas 0.1.0"
    assert backends["blas"]["cannot_run"] is None
    plugins = json.loads(installed.succeeds("lfm2kit", "plugins", "--json", "-"))["plugins"]
    assert [row["name"] for row in plugins if row["not_used"]] == []
    assert {row["editable"] for row in plugins} == {False}
    (packages,) = {row["folder"] for row in plugins}
    assert Path(packages).is_relative_to(installed.programs.parent)


@pytest.mark.parametrize(
    "plan", ["auto", "reference,mlp=blas", "reference,ffn=blas,router=reference"]
)
def test_the_embedded_model_is_valid(installed: Installed, plan: str) -> None:
    assert "\nVALID\n" in installed.succeeds("lfm2kit", "run", "--backend", plan, "-n", "8", "-v")


def test_the_suite_can_be_run_and_what_is_not_promised_is_no_failure(installed: Installed) -> None:
    check = ("backends", "check", "blas", "--json", "-", "--only")
    passed = installed.run("lfm2kit", *check, "mlp,zero-rows")
    assert (passed.returncode, json.loads(passed.stdout)["passed"]) == (0, 2), passed.stderr
    done = installed.run("lfm2kit", *check, "batch-independence")
    document = json.loads(done.stdout)
    assert (done.returncode, document["failed"], document["not_promised"]) == (0, 0, 1), done.stderr


# Whose tests take longest.
LONG = ("lfm2kit-blas", "lfm2kit-int8", "lfm2kit-perplexity", "lfm2kit-trace")
OWN_TESTS = [pytest.param(one, marks=[pytest.mark.long] * (one in LONG)) for one in PROJECTS]


@pytest.mark.parametrize("name", OWN_TESTS)
def test_a_plugins_own_tests_pass_without_its_checkout(installed: Installed, name: str) -> None:
    tests = installed.folder / name
    shutil.copytree(PROJECTS[name] / "tests", tests, ignore=shutil.ignore_patterns("__pycache__"))
    installed.succeeds("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests))


def test_a_backend_that_was_begun_passes_the_whole_suite(installed: Installed) -> None:
    """As its own tests, which find the package installed and not in its folder."""
    project = installed.folder / "lfm2kit-my-backend"
    said = installed.succeeds("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=project)
    assert re.search("[1-9][0-9] passed, [0-9]+ skipped in", said)


def test_a_backend_that_was_begun_runs_beside_another_one(installed: Installed) -> None:
    plan = "reference,mlp=my-backend,experts=my-backend"
    assert "\nVALID\n" in installed.succeeds("lfm2kit", "run", "--backend", plan, "-n", "8", "-v")


def test_a_transport_that_was_begun_passes_all_checks(installed: Installed) -> None:
    project = installed.folder / "lfm2kit-post"
    said = installed.succeeds("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=project)
    assert "7 passed" in said


def test_a_transport_that_was_begun_connects_ranks_that_share_experts(installed: Installed) -> None:
    run = ("run", "--transport", "post", "--ranks", "2", "-n", "8", "-v")
    assert "\nVALID\n" in installed.succeeds("lfm2kit", *run)


def test_a_rewrite_is_chosen_by_its_name(installed: Installed) -> None:
    arguments = ("run", "-b", "reference", "--rewrite", "slices", "-n", "8", "-v")
    printed = installed.succeeds("lfm2kit", *arguments)
    assert "reference, fp32, slices, ranks: 1" in printed
    assert "\nVALID\n" in printed


def test_a_format_of_a_plugin_is_planned_and_run(installed: Installed, tmp_path: Path) -> None:
    """The core of a wheel knows nothing of int8: it was not touched for it."""
    tiny = str(ROOT / "lfm2kit" / "models" / "tiny")
    int8, plain = str(tmp_path / "int8"), str(tmp_path / "plain")
    installed.succeeds("python", "-m", "lfm2kit_int8", tiny, int8)
    planned = installed.succeeds(
        "lfm2kit", "plan", "-m", int8, "-b", "reference,mlp=blas", "--json", "-"
    )
    formats = {row["block"]: row["formats"] for row in json.loads(planned)["blocks"]}
    assert formats["embed_tokens"] == ["I8 as stored"]
    assert formats["layers.0.feed_forward"] == ["I8 widened to F32"]
    installed.succeeds("lfm2kit", "convert", int8, plain, "--dtype", "F32")
    run = ("run", "-b", "reference", "--random-inputs", "5", "-n", "3")
    for model in (int8, plain):
        installed.succeeds("lfm2kit", *run, "-m", model, "--outputs", f"{model}.bin")
    assert Path(f"{int8}.bin").read_bytes() == Path(f"{plain}.bin").read_bytes()


def test_a_plan_is_compared_with_another_one_on_a_text(
    installed: Installed, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It is a truth")
    plans = ("-b", "reference,experts=int8:q8", "--against", "reference", "--json", "-")
    record = json.loads(installed.succeeds("lfm2kit", "perplexity", str(text), *plans))
    figures = {figure["name"]: figure["values"][0] for figure in record["figures"]}
    assert 0 < figures["mean KL divergence"] < 0.1


def test_a_damaged_gguf_file_is_one_line(installed: Installed, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF" + bytes(range(100)))
    done = installed.run("lfm2kit", "plan", "-m", str(damaged))
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{damaged}: the library gguf cannot read it" in line


def test_the_trace_is_written_and_summed_up(installed: Installed, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    installed.succeeds("lfm2kit", "run", "-b", "reference", "-n", "1", LFM2KIT_TRACE=str(trace))
    names = {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"model", "layers.0", "layers.0.operator", "lm_head"} <= names
    summary = installed.succeeds("lfm2kit", "trace-summary", str(trace))
    assert "backend:            reference" in summary
    assert "trace-summary" in installed.succeeds("lfm2kit", "--help")
