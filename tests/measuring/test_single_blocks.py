"""`lfm2kit bench --block`: a block of any kind alone, of a backend that may build no other."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm2kit import specs
from lfm2kit.backend import BackendPlugin, Block, Spec, Weights
from lfm2kit.building.loading import Setup, set_up
from lfm2kit.building.options import Options
from lfm2kit.building.plugins import InstalledBackend, installed_plugins
from lfm2kit.cli.bench import Block as Measured
from lfm2kit.errors import Lfm2kitError
from lfm2kit.measuring.single_blocks import single_blocks
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.testing.compare import each
from lfm2kit.testing.host_block import host_block
from tests.cli.test_commands import Cli, cli, fails
from tests.core.test_model import DeviceBackend
from tests.plugins.distributions import install
from tests.random_model import RANDOM

__all__ = ["cli"]

KINDS = [block.value for block in Measured if block is not Measured.model]
HIDDEN, EXPERTS, TAKEN, VOCABULARY = 128, 16, 4, 1024  # of `RANDOM`
SAMPLES, LENGTH = 2, 5


class WholeLayers(ReferenceBackend):
    """A backend that builds the reference's layers whole, and their parts alone too."""

    def why_unsupported(self, spec: Spec) -> str | None:
        return None if isinstance(spec, specs.Layer) else super().why_unsupported(spec)

    def build(self, spec: Spec, weights: Weights) -> Block:
        if isinstance(spec, specs.Layer):
            return host_block(ReferenceBackend(), spec, weights)
        return super().build(spec, weights)


class Only(ReferenceBackend):
    """A backend of one kind of block."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def why_unsupported(self, spec: Spec) -> str | None:
        return None if spec.kind == self.kind else f"it builds only {self.kind}"


class Forgets(ReferenceBackend):
    """A backend whose MLP returns nothing."""

    def build(self, spec: Spec, weights: Weights) -> Block:
        block = super().build(spec, weights)
        return (lambda x: None) if isinstance(spec, specs.MLP) else block


def setup_of(plan: str, backend: Any = None, **options: Any) -> Setup:
    plugins = installed_plugins()
    mine = BackendPlugin("mine", "a backend of this test", lambda context: backend, 1)
    plugins.backends["mine"] = InstalledBackend(mine, "this test")
    asked = Options(backend=plan, **options)
    return set_up(RANDOM, asked, plugins=plugins, may_lack=True)


def result_of(setup: Setup, kind: str) -> Any:
    (contender,) = single_blocks(setup, kind, [SAMPLES], [LENGTH], seed=0)
    assert contender.test == f"{kind} {SAMPLES}x{LENGTH}"
    assert contender.work.bytes > 0
    return contender.call()


def reference(kind: str) -> Any:
    return result_of(setup_of("reference"), kind)


def test_every_kind_of_the_specs_can_be_measured() -> None:
    of_specs = (s for s in specs.Spec.__subclasses__() if s.__module__ == specs.__name__)
    assert {s.kind for s in of_specs} == {block.value for block in Measured}


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_gets_what_a_forward_gives_it(kind: str) -> None:
    rows = SAMPLES * LENGTH
    shapes = {
        "norm": [(rows, HIDDEN)] * 2,
        "layer": [(rows, HIDDEN)] * 2,
        "rows": [(SAMPLES, HIDDEN)] * 2,
        "head": [(SAMPLES, VOCABULARY)],
        "scores": [(rows, EXPERTS)],
        "choice": [(rows, TAKEN)] * 2,
        "router": [(rows, TAKEN)] * 2,
    }
    arrays = each(reference(kind))
    assert [array.shape for array in arrays] == shapes.get(kind, [(rows, HIDDEN)])
    assert all(np.isfinite(array).all() for array in arrays)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"router", "moe", "layer"}))
def test_a_backend_of_one_kind_of_block_is_measured_without_the_rest_of_a_plan(kind: str) -> None:
    np.testing.assert_array_equal(result_of(setup_of("mine", Only(kind)), kind), reference(kind))


def test_a_backend_that_lacks_the_block_is_told_who_has_it() -> None:
    setup = setup_of("mine", Only("mlp"))
    says = {
        "conv": "layers.0.operator: backend 'mine' has no ShortConv block (it builds only mlp); ",
        "layer": "backend 'mine' lacks norm of layer 0, conv of layer 0 (it builds only mlp); ",
    }
    for kind, said in says.items():
        with pytest.raises(Lfm2kitError, match=re.escape(said)):
            result_of(setup, kind)


def test_a_block_of_a_joined_layer_may_be_mixed() -> None:
    setup = setup_of("mine,router=reference", Only("experts"))
    np.testing.assert_array_equal(result_of(setup, "moe"), reference("moe"))


@pytest.mark.parametrize("kind", ["conv", "attn", "mlp", "experts", "choice", "norm"])
def test_a_block_of_a_layer_that_is_built_whole_is_measured_alone(kind: str) -> None:
    got = result_of(setup_of("mine", WholeLayers()), kind)
    np.testing.assert_array_equal(got, reference(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_of_another_memory_takes_and_returns_host_arrays(kind: str) -> None:
    got = result_of(setup_of("mine", DeviceBackend()), kind)
    np.testing.assert_array_equal(got, reference(kind))


def test_a_kind_that_a_model_has_not_is_told_so() -> None:
    with pytest.raises(Lfm2kitError, match="no block of kind nothing; available: attn, choice, "):
        reference("nothing")


def test_a_block_is_looked_at_before_it_is_measured() -> None:
    says = "layers.0.feed_forward: the MLP block of backend 'mine' of this test returned None, but"
    with pytest.raises(Lfm2kitError, match=says):
        result_of(setup_of("mine", Forgets(), check=True), "mlp")
    result_of(setup_of("mine", Forgets(), check=True), "conv")


MINE = """
    import lfm2kit
    from lfm2kit.reference.backend import ReferenceBackend


    class Mine(ReferenceBackend):
        def why_unsupported(self, spec):
            return None if spec.kind == "mlp" else "it builds only MLP"


    @lfm2kit.hookimpl
    def lfm2kit_backends():
        yield lfm2kit.BackendPlugin("mine", "an MLP", lambda context: Mine(), api_version=1)
"""


def test_the_command_asks_a_backend_for_no_more_than_it_measures(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "alone", MINE)
    monkeypatch.syspath_prepend(tmp_path)
    few = ("bench", "-n", 2, "-r", 1, "-b", "mine", "--json", "-")
    done = cli(*few, "--block", "mlp", "--check")
    assert [row["test"] for row in json.loads(done.out)["results"]] == ["mlp 2x16"]
    fails(cli(*few, "--block", "mlp", "--block", "norm"), "has no RMSNorm block", "try --backend ")
    says = "backend 'mine' lacks embed, norm of layers 0-"
    fails(cli(*few), says, "Try --backend cpu_simd,mlp=mine")
    fails(cli(*few, "--block", "model"), says)
