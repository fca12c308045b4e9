"""The block tests: ShortConv, attention and MoE at the release's widths, on one device.

Host arrays go in and come out within the time, after a warm-up.  The assignment draws inputs and
weights from [0, 1]: every score of the router is then exactly 1, so that all tokens choose the same
experts.  A second test of each block has values as a model has them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lfm2kit.building.loading import Setup, set_up
from lfm2kit.building.options import Options
from lfm2kit.checkpoint import Checkpoint
from lfm2kit.checkpoint.config import ATTENTION, CONV, model_spec, parse_config
from lfm2kit.checkpoint.synth import LFM2_8B
from lfm2kit.measuring.bench import Contender
from lfm2kit.measuring.single_blocks import Draw, normal, single_blocks
from lfm2kit.specs import Shape
from lfm2kit.weights import Tensor, Weights

SEQ_LEN = 16  # tokens of a sample
POINTS = 10.0  # of a block
POOL = (1 << 22) - 3  # numbers; not a multiple of any width
TWO_LAYERS = {
    **LFM2_8B,
    "layer_types": [CONV, ATTENTION],
    "num_hidden_layers": 2,
    "num_dense_layers": 0,
}


class BlockTest(NamedTuple):
    """A block of the assignment: how many samples at once, and the tokens/s of full points."""

    kind: str
    samples: int
    threshold: float

    def points(self, tokens_per_second: float) -> float:
        """Return the points, which grow linearly up to the threshold."""
        return POINTS * min(1.0, tokens_per_second / self.threshold)


TESTS = (BlockTest("conv", 64, 10_000), BlockTest("attn", 128, 5_000), BlockTest("moe", 1, 250))


def uniform(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    return rng.random(shape, np.float32)


class Values(NamedTuple):
    """How inputs and weights are drawn."""

    name: str
    inputs: Draw
    weights: Draw


VALUES = (
    Values("as the assignment's", uniform, uniform),
    Values("as a model's", normal, lambda rng, shape: np.float32(0.02) * normal(rng, shape)),
)


class Drawn(Mapping[str, Tensor]):
    """Weights that are made when they are asked for, the same ones each time.

    All are pieces of one pool of drawn numbers, beginning at different places.
    """

    def __init__(self, shapes: Mapping[str, Shape], draw: Draw) -> None:
        self.shapes = shapes
        self._pool = draw(np.random.default_rng(0), (POOL,))

    def __getitem__(self, name: str) -> Tensor:
        shifted = np.roll(self._pool, zlib.crc32(name.encode()) % POOL)
        return Tensor.of_array(name, np.resize(shifted, self.shapes[name]))

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def block_setup(options: Options, values: Values) -> Setup:
    """Return two layers of the release's widths, one of each operator, with these weights."""
    config = parse_config(TWO_LAYERS)
    spec = model_spec(config, tied=True)
    weights = Weights(Drawn(spec.parameters(), values.weights))
    checkpoint = Checkpoint(Path("the assignment's blocks"), spec, weights, config)
    return set_up(checkpoint, options, may_lack=True)


def reference_setup(options: Options, values: Values) -> Setup:
    """Return the same two layers, built by the reference."""
    return block_setup(replace(options, backend="reference"), values)


def error_of(setup: Setup, reference: Setup, test: BlockTest, values: Values) -> float:
    """Return the largest error of a block beside the reference's, on one sample.

    It is relative to the largest value.
    """
    one = test._replace(samples=1)
    got, want = (contender(each, one, values).call() for each in (setup, reference))
    return float(np.max(np.abs(got - want)) / np.max(np.abs(want)))


def contender(setup: Setup, test: BlockTest, values: Values) -> Contender:
    """Return a call of the block with host arrays; raise `Lfm2kitError` if nobody builds it."""
    (found,) = single_blocks(setup, test.kind, [test.samples], [SEQ_LEN], 0, values.inputs)
    return found
