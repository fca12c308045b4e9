"""What int8 weights cost in accuracy, beside BF16: of blocks at the release's sizes, and of `tiny`.

    python benchmarks/int8/accuracy.py

Errors are normalised mean square errors.  Blocks have random weights, which BF16 rounds as well;
those of `tiny` are BF16 in its file.  Its logits are those of all beginnings of its held-out
samples, and the loss is the mean of -ln p of the tokens that follow.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from lfm2kit_int8.__main__ import quantise

from lfm2kit.backend import Batch, Context, Spec
from lfm2kit.building.loading import find_model, load_model
from lfm2kit.building.plugins import installed_plugins
from lfm2kit.measuring.samples import read_inputs
from lfm2kit.specs import MLP, Experts
from lfm2kit.testing import random_inputs, random_weights

Float32 = npt.NDArray[np.float32]
ROWS = 64
BLOCKS = {
    "MLP 2048 x 7168": MLP(2048, 7168),
    "8 experts 2048 x 1792": Experts(2048, 1792, 8, 4, tuple(range(8))),
}
PLANS = {
    "experts": "cpu_simd,experts=int8:q8",
    "experts, dense feed-forwards": "cpu_simd,experts=int8:q8,mlp=int8:q8",
}
TINY = find_model("tiny")


def nmse(got: Float32, want: Float32) -> float:
    difference = got.astype(np.float64) - want
    return float(np.sum(difference**2) / np.sum(want.astype(np.float64) ** 2))


def of_block(spec: Spec) -> Iterator[float]:
    """Yield the errors of BF16 and of int8."""
    weights, inputs = random_weights(spec), random_inputs(spec, np.random.default_rng(0), ROWS)
    create = installed_plugins().creator(Context())
    backends = map(create, ("reference", "cpu_simd:bf16", "int8:q8"))
    want, *results = (backend.build(spec, weights)(*inputs) for backend in backends)
    yield from (nmse(result, want) for result in results)


def beginnings() -> tuple[Batch, npt.NDArray[np.int32]]:
    """Return all beginnings of the samples, and the token after each of them."""
    samples = read_inputs(TINY / "inputs.bin")
    length = samples.shape[1]
    sequences = [sample[:n] for sample in samples for n in range(1, length)]
    return Batch.of_sequences(sequences), samples[:, 1:].ravel()


def loss(logits: Float32, following: npt.NDArray[np.int32]) -> float:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    chosen = shifted[np.arange(len(following)), following]
    return float(np.mean(np.log(np.exp(shifted).sum(axis=1)) - chosen))


def main() -> None:
    print("| block | BF16 | int8 |\n|---|---|---|")
    for name, spec in BLOCKS.items():
        print(f"| {name} | " + " | ".join(f"{error:.1e}" for error in of_block(spec)) + " |")
    batch, following = beginnings()
    want = load_model(TINY, "cpu_simd").logits(batch).copy()
    print("\n| int8 in `tiny` | logits | same best token | loss |\n|---|---|---|---|")
    print(f"| nothing | 0 | 100 % | {loss(want, following):.4f} |")
    with tempfile.TemporaryDirectory() as folder:
        quantise(TINY, Path(folder) / "int8")
        models = {name: (TINY, plan) for name, plan in PLANS.items()}
        models["all matrices but routers"] = (Path(folder) / "int8", "cpu_simd")
        for name, (model, plan) in models.items():
            got = load_model(model, plan).logits(batch)
            same = np.mean(got.argmax(axis=1) == want.argmax(axis=1))
            print(f"| {name} | {nmse(got, want):.1e} | {same:.1%} | {loss(got, following):.4f} |")


if __name__ == "__main__":
    main()
