"""LFM2-8B-A1B at full size with random weights: samples/s, token ids in to logits out.

    python benchmarks/cuda/full_size.py --precision fp32 -n 16,32,64,128

The weights are views of one buffer of random numbers, so that nothing of 33 GB is made or read
from a disk.  Prints a Markdown table of medians, spread, and the share of FP32's or the tensor
cores' limit that the useful work amounts to.
"""

from __future__ import annotations

import argparse
import statistics
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from lfm2kit import specs
from lfm2kit.backend import BF16, F32, Context, Format, Tensor, Weights
from lfm2kit.batch import Batch
from lfm2kit.building.builder import Builder, build_model
from lfm2kit.building.placement import Placer
from lfm2kit.building.plan import Plan
from lfm2kit.building.plugins import installed_plugins
from lfm2kit.checkpoint.config import LFM2_8B_A1B, model_spec
from lfm2kit.measuring.bench import random_batch
from lfm2kit.model import JOINS, LFM2
from lfm2kit.rewrites import chosen, rewritten

POOL = 1 << 26  # random numbers that all tensors share
STORED_AS = {"F32": F32, "BF16": BF16}


class RandomTensors(Mapping[str, Tensor]):
    """A checkpoint's tensors by name, stored as `format`: norms of ones, matrices of std 0.02.

    With a larger `bias_std`, that of the experts' bias, tokens choose some experts more often.
    """

    def __init__(
        self, shapes: Mapping[str, specs.Shape], format: Format, bias_std: float = 0.05
    ) -> None:
        self._shapes = shapes
        self._format = format
        self._bias = np.float32(bias_std / 0.02)
        self._pool = 0.02 * np.random.default_rng(0).standard_normal(POOL, dtype=np.float32)
        self._stored = self._pool
        if format == BF16:
            self._stored = (self._pool.view(np.uint32) >> 16).astype(np.uint16)

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if name.endswith("norm.weight"):
            return Tensor.of_array(name, np.ones(shape, np.float32))
        size = int(np.prod(shape))
        if name.endswith("expert_bias"):
            bias = self._bias * self._view(self._pool, name, size)
            return Tensor.of_array(name, bias.reshape(shape))
        if name == "embed_tokens.weight":
            parts = [np.roll(self._stored, i) for i in range(-(-size // POOL))]  # no row twice
            table = np.concatenate(parts)[:size].reshape(shape)
            return Tensor.of_array(name, table, self._format)
        values = self._view(self._stored, name, size).reshape(shape)
        return Tensor.of_array(name, values, self._format)

    def _view(self, pool: np.ndarray, name: str, size: int) -> np.ndarray:
        start = zlib.crc32(name.encode()) % (POOL - size + 1)
        return pool[start : start + size]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def build(plan: Plan, precision: str, stored_as: Format, rewrites: Sequence[str] = ()) -> LFM2:
    """Return the full-size model, its blocks from `plan`."""
    plugins = installed_plugins()
    create = plugins.creator(Context(precision=precision))
    spec = model_spec(LFM2_8B_A1B, tied=True)
    spec, joins = rewritten(spec, JOINS, chosen(rewrites, plugins.rewrites()))
    placed = Placer(plan, create, joins, plugins.backends).place(spec)
    weights = Weights(RandomTensors(spec.parameters(), stored_as))
    return build_model(placed, Builder(weights, create), plan.default)


def timed(model: LFM2, batch: Batch, repetitions: int) -> list[float]:
    for _ in range(3):
        model.logits(batch)
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        model.logits(batch)
        seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--stored-as", default="BF16", choices=STORED_AS)
    parser.add_argument("-n", default="16,32,64,128")
    parser.add_argument("-r", "--repetitions", type=int, default=10)
    parser.add_argument("--rewrite", action="append", default=[], help="such as trim")
    options = parser.parse_args()
    start = time.perf_counter()
    plan = Plan.parse(options.backend)
    model = build(plan, options.precision, STORED_AS[options.stored_as], options.rewrite)
    seconds = time.perf_counter() - start
    size = model.spec.weight_elements() * STORED_AS[options.stored_as].block_bytes
    print(f"loaded in {seconds:.1f} s, {size / 1e9 / seconds:.1f} GB/s as stored\n")
    print("| precision | n | ms | samples/s | spread | TFLOP/s |\n|---|---|---|---|---|---|")
    for n in map(int, options.n.split(",")):
        batch = random_batch(n, 16, model.spec.embed_tokens.vocab_size, seed=n)
        times = timed(model, batch, options.repetitions)
        median = statistics.median(times)
        spread = (max(times) - min(times)) / median
        flops = model.spec.work(batch).flops / median / 1e12
        print(
            f"| {options.precision} | {n} | {1e3 * median:.2f} | {n / median:.0f} "
            f"| {100 * spread:.1f} % | {flops:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
