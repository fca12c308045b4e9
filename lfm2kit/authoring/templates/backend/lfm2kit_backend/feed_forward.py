"""Dense feed-forwards and experts: `build` makes a block, and each forward calls it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from lfm2kit import specs
from lfm2kit.backend import Weights

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]


def linear(x: Floats, weight: Floats) -> Floats:
    """Return x @ weight.T; x [rows, in], weight [out, in] -> [rows, out].

    Each row is multiplied alone: its bits must not depend on how many others there
    are, and `x @ weight.T` chooses its order of adding by that.
    """
    y: Floats = np.matmul(weight, x[:, :, None])[:, :, 0]
    return y


class MLP:
    """w2(silu(w1 x) * w3 x)."""

    def __init__(self, spec: specs.MLP, weights: Weights) -> None:
        names = ("w1.weight", "w3.weight", "w2.weight")
        self.w1, self.w3, self.w2 = map(weights.float32, names)

    def __call__(self, x: Floats) -> Floats:
        gate = linear(x, self.w1)
        with np.errstate(over="ignore"):  # exp(100) is inf, and -100 / inf the right 0
            silu = gate / (1 + np.exp(-gate))
        return linear(silu * linear(x, self.w3), self.w2)


class Experts:
    """The sum of what each row's experts compute, each with its weight."""

    def __init__(self, spec: specs.Experts, weights: Weights) -> None:
        self.mlps = {
            e: MLP(spec.expert, weights.scope(f"experts.{e}"))
            for e in spec.local_experts
        }

    def __call__(self, x: Floats, expert_ids: Ints, expert_weights: Floats) -> Floats:
        """Call each expert with all of its rows; other ids add nothing."""
        rows, k = expert_ids.shape
        # A product of -0 changes no bit of a sum.
        products = np.full((rows, k, x.shape[1]), -0.0, np.float32)
        for e, mlp in self.mlps.items():
            row, slot = np.nonzero(expert_ids == e)
            products[row, slot] = expert_weights[row, slot, None] * mlp(x[row])
        delta = products[:, 0].copy()
        for i in range(1, k):  # in this order in all backends, for the same bits
            delta += products[:, i]
        delta[~np.isin(expert_ids, list(self.mlps)).any(axis=1)] = 0
        return delta
