"""Rates of a machine that does not exist, of which everything can be calculated by hand."""

from __future__ import annotations

from collections.abc import Iterator

from lfm2kit import specs
from lfm2kit.building.curves import Curve
from lfm2kit.building.rank_rates import BlockKey, BlockRates
from lfm2kit.building.rates import Calibration, Experts, Side
from lfm2kit.weights import Weights
from tests.random_model import RANDOM

MS = Curve((1, 2**26), (1e-3, 1e-3))  # whatever the rows are
FAST = Curve((1, 2**26), (1e-12, 2e-12))
BLOCK, EXPERT = 100, 1000  # bytes
BLOCKS_MS = 8 * 4 + 4  # of a forward: two norms, operator and router or MLP; and the ends


def blocks(spec: specs.Spec, weights: Weights = RANDOM.weights) -> Iterator[BlockKey]:
    if not isinstance(spec, specs.Experts):
        if not spec.parts() or isinstance(spec, specs.Router):
            yield BlockKey.of(spec, weights, "loom", "fp32")
        else:
            for part in spec.parts():
                yield from blocks(part.spec, weights.scope(part.scope))


def calibration(block: Curve = MS, expert: Curve = MS, **more: object) -> Calibration:
    """Return rates by which each block and each expert that is used takes 1 ms."""
    keys = dict.fromkeys(blocks(RANDOM.spec))
    key = Experts("loom", "fp32", 128, 48, "BF16")
    made = {
        "date": "today",
        "machine": {"processor": "a loom"},
        "model": "tiny",
        "sides": (Side(key, "host", EXPERT, expert, None, None, {}),),
        "blocks": tuple(BlockRates(one, BLOCK, block) for one in keys),
        "exchanges": (),
        "copies": 1e18,
    }
    return Calibration(**{**made, **more})  # type: ignore[arg-type]
