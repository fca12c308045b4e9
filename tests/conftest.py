"""What all tests need of the process that they run in."""

from __future__ import annotations

import gc
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.typed import Cli
from tests.random_model import write_random_model


def pytest_configure() -> None:
    """Let commands that tests start be interrupted.

    A script's shell starts what runs in the background (`./check.sh &`) with SIGINT ignored, and
    every process that comes of it inherits that.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Files whose tests take longest.  They begin first: else one of two workers would have none left to
# begin while the other is in the midst of such a file.
LONGEST = (
    "tests/mpi/",
    "tests/cpu_simd/test_compiling.py",
    "tests/cuda/test_compiling.py",
    "tests/cuda/test_emulated",
    "tests/plugins/test_installed.py",
    "tests/conformance/test_mixtures.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


def pytest_collection_finish() -> None:
    """Leave thousands of tests, and what they import, out of each search for garbage."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Give the device what a test's arrays took: workers, and jobs that they start, share it."""
    if item.get_closest_marker("gpu") and (cupy := sys.modules.get("cupy")) is not None:
        gc.collect()
        cupy.get_default_memory_pool().free_all_blocks()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give a worker whole files, and one worker all jobs of ranks.

    Ranks that wait for each other spin.  Two jobs on the two cores of CI take so long together that
    deadlines pass.
    """
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class JobsOneByOne(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            jobs = "tests/mpi/"
            return jobs if nodeid.startswith(jobs) else super()._split_scope(nodeid)

    return JobsOneByOne(config, log)


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the random model, which no test may change."""
    return write_random_model(tmp_path_factory.mktemp("random") / "random")


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run commands in this process."""
    return Cli(monkeypatch, capsys)
