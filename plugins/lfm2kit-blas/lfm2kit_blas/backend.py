"""ShortConv, MLP, Experts and LMHead in float32, every matrix product a call of NumPy's BLAS.

What a good BLAS library makes of the same blocks: the peer to race hand-written kernels against.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lfm2kit import specs
from lfm2kit.backend import F32, HOST, Batch, Block, Context, Format, Memory, Spec, Weights

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]


class Linear:
    """x @ weight.T + bias; x [rows, in], weight [out, in] as stored: BLAS transposes for free."""

    def __init__(self, weights: Weights, bias: bool = False) -> None:
        # A view of the checkpoint unless it is not float32, or lies so that BLAS cannot read it.
        self.weight = np.require(weights.float32("weight"), requirements=("C", "A"))
        self.bias = weights.float32("bias") if bias else None

    def __call__(self, x: Floats) -> Floats:
        y: Floats = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class MLP:
    def __init__(self, spec: specs.MLP, weights: Weights) -> None:
        self.w1, self.w3, self.w2 = (Linear(weights.scope(name)) for name in ("w1", "w3", "w2"))

    def __call__(self, x: Floats) -> Floats:
        gate = self.w1(x)
        with np.errstate(over="ignore"):  # exp(100) is inf in float32, and a / inf the right 0
            silu = gate / (1 + np.exp(-gate))
        return self.w2(silu * self.w3(x))


class Experts:
    """Permute the (row, k) pairs by expert, one MLP call per expert, then add up each row's k."""

    def __init__(self, spec: specs.Experts, weights: Weights) -> None:
        self.num_experts = spec.num_experts
        self.experts = {
            e: MLP(spec.expert, weights.scope(f"experts.{e}")) for e in spec.local_experts
        }

    def __call__(self, x: Floats, expert_ids: Ints, expert_weights: Floats) -> Floats:
        rows, top_k = expert_ids.shape
        pairs = np.argsort(expert_ids, axis=None, kind="stable")  # pair = row * top_k + k
        counts = np.bincount(expert_ids.reshape(-1), minlength=self.num_experts)
        products = np.empty((rows * top_k, x.shape[1]), np.float32)
        for e, mine in enumerate(np.split(pairs, np.cumsum(counts)[:-1])):
            if len(mine):
                weights = expert_weights.reshape(-1)[mine, None]
                products[mine] = weights * self.experts[e](x[mine // top_k])
        return _sum_in_order(products.reshape(rows, top_k, x.shape[1]))


def _sum_in_order(products: Floats) -> Floats:
    """[rows, top_k, hidden_size] -> [rows, hidden_size]: k after k, which `np.sum` need not do."""
    delta = products[:, 0].copy()
    for k in range(1, products.shape[1]):
        delta += products[:, k]
    return delta


class ShortConv:
    def __init__(self, spec: specs.ShortConv, weights: Weights) -> None:
        self.in_proj = Linear(weights.scope("in_proj"), spec.bias)
        self.out_proj = Linear(weights.scope("out_proj"), spec.bias)
        self.taps = weights.float32("conv.weight")[:, 0, :].T  # [kernel_size, hidden_size]
        self.bias = weights.float32("conv.bias") if spec.bias else np.float32(0)
        self.past_shape = (spec.kernel_size - 1, spec.hidden_size)

    def __call__(self, x: Floats, batch: Batch, state: Floats | None) -> Floats:
        B, C, X = np.split(self.in_proj(x), 3, axis=1)
        u = B * X
        y: Floats = np.empty_like(u)
        for i, slot in enumerate(batch.state_slots):
            rows = slice(batch.cu_seqlens[i], batch.cu_seqlens[i + 1])
            past = self._past(state, slot, batch.positions[rows.start])
            seen = np.concatenate([past, u[rows]])
            tokens = len(seen) - len(past)
            y[rows] = sum(tap * seen[j : j + tokens] for j, tap in enumerate(self.taps))
            if state is not None:
                state[slot] = seen[tokens:]
        return self.out_proj(C * (y + self.bias))

    def _past(self, state: Floats | None, slot: int, position: int) -> Floats:
        """What the slot holds of its sequence: nothing, whatever lies there, at its start."""
        if state is None or position == 0:
            return np.zeros(self.past_shape, np.float32)
        past: Floats = state[slot]
        return past

    def new_state(self, slots: int, max_tokens: int) -> Floats:
        """The last kernel_size - 1 rows of u of each slot; zeros where a sequence is shorter."""
        return np.empty((slots, *self.past_shape), np.float32)

    def state_bytes(self, slots: int, max_tokens: int) -> int:
        return slots * self.past_shape[0] * self.past_shape[1] * 4


BLOCKS: dict[type[Spec], Any] = {
    specs.ShortConv: ShortConv,
    specs.MLP: MLP,
    specs.Experts: Experts,
    specs.LMHead: lambda spec, weights: Linear(weights),
}


class BlasBackend:
    def __init__(self, context: Context) -> None:
        self.context = context

    def why_unsupported(self, spec: Spec) -> str | None:
        there = ", ".join(known.__name__ for known in BLOCKS)
        return None if type(spec) in BLOCKS else f"it builds {there}"

    def memory(self, spec: Spec) -> Memory:
        return HOST

    def build(self, spec: Spec, weights: Weights) -> Block:
        block: Block = BLOCKS[type(spec)](spec, weights)
        return block

    def workspace_bytes(self, spec: Spec, weights: Weights, tokens: int) -> int:
        """Counts weights that are widened to float32; others stay views of the checkpoint."""
        tensors = (weights[name] for name in spec.parameters())
        return sum(4 * t.size for t in tensors if t.format != F32)

    def kept_formats(self, spec: Spec, weights: Weights) -> dict[str, Format]:
        """BLAS multiplies float32 alone."""
        return dict.fromkeys(spec.parameters(), F32)

    def notes(self) -> list[str]:
        blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
        notes = [f"NumPy's BLAS is {blas['name']} {blas['version']}"]
        if self.context.threads is not None or self.context.local_ranks > 1:
            notes.append("its threads are set by OPENBLAS_NUM_THREADS (or the like), not from here")
        return notes
