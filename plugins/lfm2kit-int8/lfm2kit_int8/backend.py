"""Dense feed-forwards and experts whose matrices stay in int8, and are widened row by row of x."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from lfm2kit.backend import HOST, Block, Format, Memory, Spec, Tensor, Weights
from lfm2kit.specs import MLP, Experts
from lfm2kit_int8.formats import I8

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]


class Int8Backend:
    def why_unsupported(self, spec: Spec) -> str | None:
        return None if type(spec) in BLOCKS else "it builds MLP and Experts"

    def memory(self, spec: Spec) -> Memory:
        return HOST

    def build(self, spec: Spec, weights: Weights) -> Block:
        block: Block = BLOCKS[type(spec)](spec, weights)
        return block

    def kept_formats(self, spec: Spec, weights: Weights) -> dict[str, Format]:
        return dict.fromkeys(spec.parameters(), I8)

    def kept_bytes(self, spec: Spec, weights: Weights) -> int:
        """Return the bytes of the matrices that are rounded; others are views of the checkpoint."""
        shapes = spec.parameters()
        rounded = [shape for name, shape in shapes.items() if weights[name].format != I8]
        return sum(math.prod(shape) + 4 * math.prod(shape[:-1]) for shape in rounded)

    def scratch_bytes(self, spec: Spec, tokens: int) -> int:
        """Return the bytes of the largest matrix in float32: one after the other is widened."""
        largest = max(map(math.prod, spec.parameters().values()), default=0)
        return 4 * largest if tokens else 0


class Linear:
    """A product x @ weight.T, of a matrix [out, in] in int8."""

    def __init__(self, weight: Tensor) -> None:
        self.data, self.scales = weight.stored_as(I8).arrays

    def __call__(self, x: Float32) -> Float32:
        """Multiply row by row: in `x @ weight.T`, rounding depends on the number of rows."""
        sums = np.matmul(self.data.astype(np.float32), x[:, :, None])[:, :, 0]
        product: Float32 = sums * self.scales
        return product


class MLPBlock:
    def __init__(self, spec: MLP, weights: Weights) -> None:
        self.w1, self.w3, self.w2 = (Linear(weights[f"{n}.weight"]) for n in ("w1", "w3", "w2"))

    def __call__(self, x: Float32) -> Float32:
        gate = self.w1(x)
        with np.errstate(over="ignore"):  # exp(100) is inf in float32, and a / inf the right 0
            silu = gate / (1 + np.exp(-gate))
        return self.w2(silu * self.w3(x))


class ExpertsBlock:
    def __init__(self, spec: Experts, weights: Weights) -> None:
        self.experts = {
            e: MLPBlock(spec.expert, weights.scope(f"experts.{e}")) for e in spec.local_experts
        }

    def __call__(self, x: Float32, expert_ids: Int32, expert_weights: Float32) -> Float32:
        """Return the sum of products, added in the order of k.

        What is not of these experts counts as -0, which changes no bit of a sum.
        """
        products = np.full((*expert_ids.shape, x.shape[1]), -0.0, np.float32)
        is_local = np.isin(expert_ids, list(self.experts))
        for e in np.unique(expert_ids[is_local]).tolist():
            rows, slots = np.nonzero(expert_ids == e)
            weights = expert_weights[rows, slots, None]
            products[rows, slots] = weights * self.experts[e](x[rows])
        delta = products[:, 0].copy()
        for k in range(1, products.shape[1]):
            delta += products[:, k]
        delta[~is_local.any(axis=1)] = 0
        return delta


BLOCKS = {MLP: MLPBlock, Experts: ExpertsBlock}
