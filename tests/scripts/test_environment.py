"""./run.sh and ./check.sh on odd machines: how they treat settings, paths and leftovers.

Python, venv and pip are a script that says what it was asked for: nothing is installed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = (
    "bash",
    "env",
    "cat",
    "cksum",
    "cp",
    "dirname",
    "flock",
    "ln",
    "mkdir",
    "mktemp",
    "readlink",
    "rm",
    "sed",
    "sleep",
)
PYTHON = """#!/usr/bin/env bash
settings="PIP_USER=${PIP_USER-} PIP_TARGET=${PIP_TARGET-} PYTHONPATH=${PYTHONPATH-}"
echo "${0##*/} $* $settings" >>"$LOG"
case "$*" in
  *version_info*) exit "${TOO_OLD:-0}" ;;
  *ensurepip*) exit "${NO_VENV:-0}" ;;
  "-m venv "*)
    made="${!#}/bin"
    mkdir -p "$made" && cp "$0" "$made/python" && cp "$0" "$made/pip"
    ;;
  "-m pip "*) sleep "${PIP_TAKES:-0}" && exit "${PIP_FAILS:-0}" ;;
  "-P -m lfm2kit "*) printf '<%s>' "$@" && pwd ;;
  "-m mypy")
    echo "types: ${TYPES:-0}"
    [ -z "${TYPES_TAKE:-}" ] || exec sleep "$TYPES_TAKE"
    exit "${TYPES:-0}"
    ;;
  "-m pytest "*)
    echo "tests: ${TESTS:-0}"
    [ -z "${TESTS_TAKE:-}" ] || exec sleep "$TESTS_TAKE"
    sleep "${TESTS_END_AFTER:-0}"
    exit "${TESTS:-0}"
    ;;
esac
"""
UV = """#!/usr/bin/env bash
echo "uv $*" >>"$LOG"
case "$1" in
  venv) mkdir -p "${!#}/bin" && cp "$(command -v python3)" "${!#}/bin/python" ;;
esac
"""


class Done(NamedTuple):
    code: int
    out: str
    err: str


class Machine:
    """A checkout, and a PATH with nothing on it but plain tools and the script above."""

    def __init__(self, folder: Path, checkout: str = "checkout") -> None:
        self.path, self.log = folder / "bin", folder / "log"
        self.path.mkdir()
        self.log.touch()
        for tool in TOOLS:
            found = shutil.which(tool)
            if found is None:
                pytest.skip(f"there is no {tool}")
            (self.path / tool).symlink_to(found)
        self.put("python3", PYTHON)
        self.checkout = folder / checkout
        for name in ("run.sh", "scripts/environment.sh", "pyproject.toml"):
            (self.checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.checkout / name)
        (self.checkout / "backends/one").mkdir(parents=True)
        (self.checkout / "backends/one/pyproject.toml").touch()
        self.venv = self.checkout / ".venv"

    def put(self, name: str, script: str) -> None:
        (self.path / name).unlink(missing_ok=True)
        (self.path / name).write_text(script)
        (self.path / name).chmod(0o755)

    def start(
        self, *arguments: str, script: Path | None = None, **settings: str
    ) -> subprocess.Popen[str]:
        script = script or self.checkout / "run.sh"
        return subprocess.Popen(
            [str(self.path / "bash"), str(script), *arguments],
            env={"PATH": str(self.path), "LOG": str(self.log), **settings},
            cwd=self.path.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, script: Path | None = None, **settings: str) -> Done:
        job = self.start(*arguments, script=script, **settings)
        out, err = job.communicate(timeout=60)
        return Done(job.returncode, out, err)

    def calls(self, of: str) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if of in line]

    def installations(self) -> list[str]:
        """Return the calls that install lfm2kit, once what builds it is there."""
        needed, *built = self.calls("-m pip install")
        assert "hatchling editables" in needed
        assert all("--no-build-isolation" in call for call in built)
        return built


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def refused(done: Done, *words: str) -> None:
    """Exit code 2, and one line of error, which says all the words."""
    assert done.code == 2, done
    *begun, line = done.err.splitlines()
    assert all("installing" in other for other in begun)
    assert line.startswith("lfm2kit: error: ")
    for word in words:
        assert word in line


def test_the_first_call_installs_and_the_second_only_runs(machine: Machine) -> None:
    for _ in range(2):
        done = machine.run("-v", "two words")
        assert done == (
            0,
            f"<-P><-m><lfm2kit><run><-v><two words>{machine.path.parent}\n",
            done.err,
        )
    assert len(machine.calls("-m venv")) == len(machine.installations()) == 1
    assert done.err == ""


def test_what_a_run_installs_can_generate_text(machine: Machine) -> None:
    machine.run()
    (call,) = machine.installations()
    assert "-e .[chat] " in call


def test_settings_that_lead_past_the_environment_are_left_out(machine: Machine) -> None:
    settings = {
        "PIP_USER": "1",
        "PIP_TARGET": "/else",
        "PYTHONPATH": "/else",
        "PYTHONHOME": "/else",
    }
    assert machine.run(**settings).code == 0
    (call,) = machine.installations()
    assert call.endswith("PIP_USER=0 PIP_TARGET= PYTHONPATH=")
    assert machine.calls("-m lfm2kit")[0].endswith("PYTHONPATH=")


@pytest.mark.parametrize("name", ["a b", "-dash", "it's", '"quoted"', "größe", "a[b]#%20", "a:b"])
def test_a_checkout_may_lie_anywhere(tmp_path: Path, name: str) -> None:
    machine = Machine(tmp_path, name)
    assert machine.run("-v", CDPATH=str(tmp_path)).code == 0
    assert machine.run("-v").err == ""


def test_a_link_to_the_script_runs_the_checkout_that_it_leads_to(machine: Machine) -> None:
    link = machine.path.parent / "link"
    link.symlink_to(machine.checkout / "run.sh")
    assert machine.run("-v", script=link).code == 0
    assert machine.venv.exists()


def test_a_python_without_venv_is_told_the_package_and_leaves_nothing(machine: Machine) -> None:
    done = machine.run(NO_VENV="1")
    refused(done, "python3 has no module venv", "apt install python3-venv")
    assert len(done.err.splitlines()) == 1
    assert not machine.venv.exists()


def test_another_python_that_has_venv_is_taken(machine: Machine) -> None:
    machine.put("python3.12", PYTHON)
    machine.put("python3", PYTHON.replace('"${NO_VENV:-0}"', "1"))
    assert machine.run().code == 0
    assert machine.calls("python3.12 -m venv")


def test_an_old_python_is_told_what_is_needed(machine: Machine) -> None:
    refused(machine.run(TOO_OLD="1"), "Python 3.11 or newer")
    assert not machine.venv.exists()


def test_a_machine_without_python_is_told_so(machine: Machine) -> None:
    (machine.path / "python3").unlink()
    refused(machine.run(), "found none")


def test_what_pip_cannot_install_is_an_error_and_tried_anew(machine: Machine) -> None:
    refused(machine.run(PIP_FAILS="1"), "pip could not install", "PIP_FIND_LINKS")
    assert machine.run().code == 0
    assert len(machine.calls("-m venv")) == 2


def test_an_interrupted_installation_is_made_anew(machine: Machine) -> None:
    job = machine.start(PIP_TAKES="60")
    while not machine.calls("-m pip install"):
        time.sleep(0.01)
    (machine.venv / "half a package").touch()
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    assert machine.run().code == 0
    assert not (machine.venv / "half a package").exists()


def test_a_moved_checkout_is_installed_anew(machine: Machine) -> None:
    machine.run()
    machine.checkout = machine.checkout.rename(machine.checkout.with_name("moved"))
    assert machine.run().code == 0
    assert len(machine.calls("-m venv")) == 2


def test_an_environment_that_the_user_made_is_not_removed(machine: Machine) -> None:
    machine.venv.mkdir()
    (machine.venv / "thesis.txt").touch()
    refused(machine.run(PIP_FAILS="1"))
    assert machine.run().code == 0
    machine.checkout = machine.checkout.rename(machine.checkout.with_name("moved"))
    assert machine.run().code == 0
    assert (machine.checkout / ".venv/thesis.txt").exists()


def test_of_two_calls_at_once_one_installs(machine: Machine) -> None:
    jobs = [machine.start(PIP_TAKES="0.3") for _ in range(2)]
    assert [job.wait(60) for job in jobs] == [0, 0]
    assert len(machine.installations()) == 1
    for job in jobs:
        job.communicate()


def test_without_symbolic_links_python_is_copied(machine: Machine) -> None:
    machine.put("ln", "#!/usr/bin/env bash\nexit 1\n")
    assert machine.run().code == 0
    assert machine.calls("-m venv --copies")
    assert (machine.venv / "lib64").is_dir()


def test_where_uv_fails_pip_is_taken_and_says_so(machine: Machine) -> None:
    machine.put("uv", "#!/usr/bin/env bash\nexit 1\n")
    done = machine.run()
    assert done.code == 0
    assert "uv could not install it" in done.err


def test_what_uv_makes_has_pip_for_the_user(machine: Machine) -> None:
    machine.put("uv", UV)
    assert machine.run().code == 0
    (call,) = machine.calls("uv pip install")
    assert "pip" in call.split()[3:]
    assert not machine.calls("-m pip install")


def test_what_does_not_work_once_installed_is_told_in_its_own_words(machine: Machine) -> None:
    broken = PYTHON.replace(
        "esac", "  *numba*) printf 'Traceback\\nno such library\\n'; exit 1 ;;\nesac"
    )
    machine.put("python3", broken)
    refused(machine.run(), "does not work: no such library")


@pytest.fixture
def check(machine: Machine) -> Path:
    return shutil.copy(ROOT / "check.sh", machine.checkout / "check.sh")


@pytest.mark.parametrize(
    ("arguments", "tests"),
    [
        (["-x"], "-n 3 --dist loadfile --no-loadscope-reorder -m not long --timeout 300 -x"),
        (["--long", "-x"], "-n 3 --dist loadfile --no-loadscope-reorder --timeout 3600 -x"),
        (["--gpu", "-x"], "-m gpu -rs -x"),
    ],
)
def test_check_runs_the_tests_that_take_minutes_only_if_asked(
    arguments: list[str], tests: str, machine: Machine, check: Path
) -> None:
    assert machine.run(*arguments, script=check).code == 0
    (call,) = machine.calls("-m pytest")
    assert f"-m pytest {tests} PIP_USER" in call
    assert len(machine.calls("-m ruff")) == 2
    assert len(machine.calls("-m mypy")) == 1


def test_only_a_check_of_everything_compiles_cuda_sources_beside_the_tests(
    machine: Machine, check: Path
) -> None:
    job = machine.start(script=check, TESTS_TAKE="1000")
    while len(calls := machine.calls("-m pytest")) < 2:
        time.sleep(0.01)
    os.killpg(job.pid, signal.SIGINT)
    job.communicate(timeout=10)
    assert sum("tests/cuda/test_compiling.py" in call for call in calls) == 1


@pytest.mark.parametrize(("types", "tests", "code"), [(0, 0, 0), (1, 0, 1), (0, 5, 5), (2, 5, 5)])
def test_check_fails_if_types_or_tests_do_and_shows_the_types_last(
    types: int, tests: int, code: int, machine: Machine, check: Path
) -> None:
    done = machine.run(script=check, TYPES=str(types), TESTS=str(tests), TESTS_END_AFTER="0.1")
    assert done == (code, f"tests: {tests}\ntypes: {types}\n", done.err)


def test_an_interrupt_ends_the_tests_and_the_types(machine: Machine, check: Path) -> None:
    job = machine.start(script=check, TYPES_TAKE="1000", TESTS_TAKE="1000")
    assert job.stdout is not None
    assert job.stdout.readline() == "tests: 0\n"
    while not machine.calls("-m mypy"):
        time.sleep(0.01)
    os.killpg(job.pid, signal.SIGINT)
    assert job.communicate(timeout=10)[0] == ""
    assert job.returncode == 130
    with suppress(ProcessLookupError):
        while True:
            os.killpg(job.pid, 0)
            time.sleep(0.01)


def test_no_process_of_a_check_compiles_all_modules_anew(machine: Machine, check: Path) -> None:
    machine.put(
        "python3", PYTHON.replace("PIP_USER=", "COMPILED=${PYTHONDONTWRITEBYTECODE-} PIP_USER=")
    )
    assert machine.run(script=check, PYTHONDONTWRITEBYTECODE="1").code == 0
    calls = machine.calls("-m pytest")
    assert calls
    assert all("COMPILED= " in call for call in calls)
