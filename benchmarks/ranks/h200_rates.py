"""Writes rates of one H200 in FP32, put together from the figures of docs/performance-cuda.md.

    python benchmarks/ranks/h200_rates.py benchmarks/ranks/h200-fp32.json

They stand in for a calibration on such a machine, until there is one: products and reads are
measured figures of that page, the small kernels are those of bf16, and what lies between is
interpolated.  The model is LFM2-8B-A1B.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from lfm2kit import specs
from lfm2kit.building.curves import Curve
from lfm2kit.building.rank_rates import NOTHING, BlockKey, BlockRates
from lfm2kit.building.rates import Calibration, Experts, Link, Side
from lfm2kit.checkpoint.config import LFM2_8B_A1B, model_spec
from lfm2kit.cli.console import write_document

ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
READ = 3.9e12  # bytes per second of weights, "at 32 rows per expert"
LAUNCH = 2.5e-6  # seconds that the smallest kernels take
# TFLOP/s by rows, from "Products", and from "FP32 with few rows" for 16 and 48 of them.
WIDE = {16: 40, 48: 53, 256: 44.2, 512: 49.4, 1024: 51.7, 2048: 52.3}  # 6144 x 2048
SQUARE = {16: 29, 256: 37.1, 512: 41.8, 1024: 46.7, 2048: 48.1}  # 2048 x 2048
GATED = {16: 40, 32: 41.8, 64: 45.2, 128: 48.8, 256: 50.2}
DOWN = {16: 40, 32: 40.5, 64: 43.8, 128: 49.5, 256: 52.0}
HEAD = {16: 29.4, 128: 50.5}
# us of a forward of bf16 with n = 16 and n = 128 samples, from "Where the time goes", and how many
# of these a model has.
NORMS, ROUTER, CONVOLUTION, ATTENTION = (186, 760, 49), (110, 365, 22), (87, 293, 18), (101, 334, 6)
GROUPING = (54 + 75 + 59, 288 + 109 + 265, 22)
PACKING = 1.017  # of products, for packing activations into slabs
STAGED = 50e9  # bytes per second between the device and the host, "H2D 46, D2H 55 GB/s"


def product(rows: int, outputs: int, inputs: int, rates: dict[int, float]) -> float:
    """Return the seconds of a product: of its weights at READ, or of its arithmetic."""
    teraflops = float(np.interp(rows, list(rates), list(rates.values())))
    flops = 2 * outputs * inputs * max(rows, 8)  # the heights of tiles are multiples of 8
    return max(PACKING * flops / (1e12 * teraflops), 4 * outputs * inputs / READ, LAUNCH)


def small(rows: int, figures: tuple[float, float, int]) -> float:
    """Return the seconds of small kernels, of which two figures are known."""
    at_16, at_128, blocks = figures
    us = float(np.interp(rows, (256, 2048), (at_16, at_128))) / blocks
    return max(LAUNCH, 1e-6 * us)


def seconds_of(spec: specs.Spec) -> Callable[[int], float]:
    """Return the seconds of a block by rows."""
    match spec:
        case specs.ShortConv():
            h = spec.hidden_size
            return lambda rows: (
                product(rows, 3 * h, h, WIDE)
                + product(rows, h, h, SQUARE)
                + small(rows, CONVOLUTION)
            )
        case specs.Attention():
            h, kv = spec.hidden_size, spec.num_key_value_heads * spec.head_dim
            return lambda rows: (
                product(rows, h + 2 * kv, h, SQUARE)
                + product(rows, h, h, SQUARE)
                + small(rows, ATTENTION)
            )
        case specs.MLP():
            h, m = spec.hidden_size, spec.intermediate_size
            return lambda rows: product(rows, 2 * m, h, WIDE) + product(rows, h, m, WIDE)
        case specs.Router():
            return lambda rows: small(rows, ROUTER) + small(rows, GROUPING)
        case specs.LMHead():
            v, h = spec.vocab_size, spec.hidden_size
            return lambda rows: product(rows, v, h, HEAD)
        case specs.RMSNorm():
            return lambda rows: small(rows, NORMS)
    return lambda rows: LAUNCH


def blocks(spec: specs.Spec) -> Iterator[specs.Spec]:
    """Yield the blocks of a model that compute no experts, its routers whole."""
    if isinstance(spec, specs.Router) or not spec.parts():
        if not isinstance(spec, specs.Experts):
            yield spec
        return
    for part in spec.parts():
        yield from blocks(part.spec)


def stored(spec: specs.Spec) -> str:
    """Return the format of a block's weights in the published checkpoint: a bias is F32."""
    if not spec.parameters():
        return NOTHING
    return "BF16 and F32" if isinstance(spec, specs.Router) else "BF16"


def main() -> None:
    model = model_spec(LFM2_8B_A1B, tied=True)
    different = dict.fromkeys(blocks(model))
    of_experts = next(leaf for leaf in specs.leaves(model) if isinstance(leaf, specs.Experts))
    h, m = of_experts.hidden_size, of_experts.intermediate_size
    key = Experts("cuda", "fp32", h, m, "BF16")
    of_one = [product(r, 2 * m, h, GATED) + product(r, h, m, DOWN) for r in ROWS]
    memory, link = "cuda:0", Link(46e9, 55e9)
    side = Side(key, memory, 12 * h * m, Curve(ROWS, tuple(of_one)), link, None, {"device": "H200"})
    calibration = Calibration(
        "2026-11-28T00:00:00+00:00",
        {"processor": "one H200, from the figures of docs/performance-cuda.md"},
        "lfm2-8b-a1b",
        (side,),
        tuple(
            BlockRates(
                BlockKey(repr(spec), "cuda", "fp32", stored(spec)),
                0 if isinstance(spec, specs.Embedding) else 4 * spec.weight_elements(),
                Curve(ROWS, tuple(map(seconds_of(spec), ROWS))),
            )
            for spec in different
        ),
        (),
        STAGED,
    )
    write_document(Path(sys.argv[1]), calibration.document())


if __name__ == "__main__":
    main()
