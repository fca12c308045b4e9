"""The hybrid backend's placement, with stand-ins for the GPU and the CPU."""

from __future__ import annotations

import numpy as np
from lfm2kit_hybrid.backend import HybridBackend

from lfm2kit import specs
from lfm2kit.backend import Backend, Block, Context, Memory, Spec, Weights
from lfm2kit.batch import Batch
from lfm2kit.errors import Lfm2kitError
from lfm2kit.model import LFM2
from lfm2kit.reference.backend import ReferenceBackend
from tests.core.small import build, small_spec
from tests.core.test_model import SEQUENCES, AroundBackend, DeviceBackend


class WholeLayers(AroundBackend):
    """A device that can compute a choice itself, too."""

    def memory(self, spec: Spec) -> Memory:
        return self.there

    def build(self, spec: Spec, weights: Weights) -> Block:
        is_choice = isinstance(spec, specs.Choice)
        return (
            DeviceBackend.build(self, spec, weights) if is_choice else super().build(spec, weights)
        )


def hybrid_of(gpu: Backend | None) -> LFM2:
    def create(name: str) -> Backend:
        if name == "cpu_simd":
            return ReferenceBackend()
        if gpu is None:
            raise Lfm2kitError("there is no GPU")
        return gpu

    model = build(small_spec(), "hybrid", {"hybrid": HybridBackend(Context(create_backend=create))})
    batch = Batch.of_sequences(SEQUENCES)
    np.testing.assert_array_equal(model.logits(batch), build(small_spec()).logits(batch))
    return model


def places(model: LFM2, layer: int) -> dict[str, tuple[str, str]]:
    leaves = dict(model.placed.parts)[f"layers.{layer}"].leaves()
    prefix = f"layers.{layer}"
    return {
        leaf.name.removeprefix(prefix).strip("."): (type(leaf.spec).__name__, leaf.memory.name)
        for leaf in leaves
    }


def test_whole_layers_are_built_around_a_choice_on_the_cpu() -> None:
    model = hybrid_of(WholeLayers())
    assert places(model, 0) == {"": ("Layer", "elsewhere")}
    assert places(model, 2) == {
        "": ("Layer", "elsewhere"),
        "feed_forward.router.choice": ("Choice", "host"),
    }
    assert model.placed.copies() == 2


def test_without_whole_layers_scores_cross_and_hidden_rows_do_not() -> None:
    model = hybrid_of(DeviceBackend())
    blocks = places(model, 2)
    assert blocks["feed_forward.router.scores"] == ("Scores", "elsewhere")
    assert blocks["feed_forward.router.choice"] == ("Choice", "host")
    assert blocks["feed_forward.experts"] == ("Experts", "elsewhere")
    assert model.placed.copies() == 2


def test_without_a_gpu_everything_is_on_the_cpu() -> None:
    assert hybrid_of(None).placed.copies() == 0
