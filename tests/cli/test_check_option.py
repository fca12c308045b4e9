"""`--check` and `run -v` name the block and the plugin of a wrong result before they time it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.test_commands import Cli, cli, fails
from tests.plugins.distributions import install, lfm2kit

__all__ = ["cli"]

# A plugin with a backend for each thing that may be wrong with a result.
MINE = """
    import lfm2kit
    import numpy as np
    from lfm2kit.backend import HOST
    from lfm2kit.reference.backend import ReferenceBackend
    from lfm2kit.specs import MLP


    class Tensor:  # an array of another library
        def __init__(self, array):
            self.shape, self.dtype = array.shape, "float32"


    CHANGES = {
        "right": lambda x: x,
        "forgets": lambda x: None,
        "foreign": Tensor,
        "fortran": np.asfortranarray,
        "unwritten": lambda x: np.full_like(x, np.nan),
    }


    class Mine(ReferenceBackend):
        def __init__(self, change):
            self.change = change

        def build(self, spec, weights):
            block = super().build(spec, weights)
            return lambda x: self.change(block(x))

        def why_unsupported(self, spec):
            return None if isinstance(spec, MLP) else "it builds only MLP"


    @lfm2kit.hookimpl
    def lfm2kit_backends():
        for name, change in CHANGES.items():
            create = lambda context, change=change: Mine(change)
            yield lfm2kit.BackendPlugin(name, "an MLP", create, api_version=1)
"""
BLOCK = "layers.0.feed_forward: the MLP block of backend '{}' of lfm2kit-results 1.0 returned "
SAYS = {
    "forgets": "None, but must return an array [17, 256]",
    "foreign": "a result that is a lfm2kit_results.Tensor, but arrays of memory 'host' are ",
    "fortran": "a result that is not C-contiguous",
    "unwritten": "a result that holds nan at [0, 0]",
}
COMMANDS: tuple[tuple[object, ...], ...] = (
    ("run", "-v", "-n", 2),
    ("run", "--check", "-n", 2),
    ("bench", "--check", "-n", 1, "-r", 1),
    ("generate", "It is", "--check", "--max-tokens", 1),
)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    install(tmp_path, "results", MINE)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize("backend", SAYS)
def test_a_run_that_validates_names_block_and_plugin(cli: Cli, site: Path, backend: str) -> None:
    around = "cpu_simd" if backend == "foreign" else "reference"  # a block that Numba would refuse
    done = cli("run", "-v", "-n", 2, "--backend", f"{around},mlp={backend}")
    assert "Elapsed" not in done.out
    fails(done._replace(out=""), BLOCK.format(backend) + SAYS[backend])


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: words[0] + words[1])
def test_commands_look_where_they_are_told_to(
    cli: Cli, site: Path, command: tuple[object, ...]
) -> None:
    done = cli(*command, "--backend", "reference,mlp=fortran")
    fails(done._replace(out=""), BLOCK.format("fortran") + SAYS["fortran"])
    assert cli(*command, "--backend", "reference,mlp=right").code == 0


def test_without_the_option_nothing_is_looked_at(cli: Cli, site: Path) -> None:
    assert cli("run", "-n", 2, "--backend", "reference,mlp=fortran").code == 0


def test_a_sound_run_has_the_same_output_with_and_without_the_option(cli: Cli, site: Path) -> None:
    for options in (("--trim",), ("--record-load", site / "load.json")):
        plain, checked = (
            cli("run", "-n", 3, "-b", "reference", "--outputs", site / name, *options, *more)
            for name, more in (("plain", ()), ("checked", ("--check",)))
        )
        assert (plain.code, checked.code) == (0, 0)
        assert (site / "plain").read_bytes() == (site / "checked").read_bytes()


def test_the_suite_looks_where_whole_models_run(cli: Cli, site: Path) -> None:
    done = cli("backends", "check", "fortran", "--only", "whole-model")
    assert done.code == 1
    assert "feed_forward: the MLP block of backend 'on trial' returned a result" in done.out


def test_ranks_say_it_once(site: Path) -> None:
    pytest.importorskip("lfm2kit_mpi")
    plan = "reference,mlp=unwritten"
    done = lfm2kit(site, "run", "--ranks", "2", "-v", "-n", "2", "--backend", plan)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error:" in line]
    assert f"error: {BLOCK.format('unwritten')}{SAYS['unwritten']}" in line
    assert "Elapsed" not in done.stdout
