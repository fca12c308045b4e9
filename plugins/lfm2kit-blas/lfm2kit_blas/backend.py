"""ShortConv, MLP, Experts and LMHead in float32, every matrix product a call of NumPy's BLAS.

What a good BLAS library makes of the same blocks: the peer to race hand-written kernels against.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lfm2kit import specs
from lfm2kit.backend import (
    F32,
    HOST,
    STEP_BACK,
    Batch,
    Block,
    Context,
    Format,
    Memory,
    Room,
    Spec,
    Weights,
)

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]


class Linear:
    """A product x @ weight.T + bias, weight [out, in] as stored: BLAS transposes for free."""

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
    """A block that permutes (row, k) pairs by expert, and calls one MLP per expert."""

    def __init__(self, spec: specs.Experts, weights: Weights) -> None:
        self.experts = {
            e: MLP(spec.expert, weights.scope(f"experts.{e}")) for e in sorted(spec.local_experts)
        }

    def __call__(self, x: Floats, expert_ids: Ints, expert_weights: Floats) -> Floats:
        rows, top_k = expert_ids.shape
        pairs = np.argsort(expert_ids, axis=None, kind="stable")  # pair = row * top_k + k
        begins = np.searchsorted(expert_ids.reshape(-1)[pairs], list(self.experts))
        # What is nobody's, -1, comes first: it stays -0, which changes no bit of a sum.
        products = np.full((rows * top_k, x.shape[1]), -0.0, np.float32)
        for mlp, mine in zip(self.experts.values(), np.split(pairs, begins)[1:], strict=True):
            if len(mine):
                weights = expert_weights.reshape(-1)[mine, None]
                products[mine] = weights * mlp(x[mine // top_k])
        delta = _sum_in_order(products.reshape(rows, top_k, x.shape[1]))
        delta[(expert_ids < 0).all(axis=1)] = 0
        return delta


def _sum_in_order(products: Floats) -> Floats:
    """Sum [rows, top_k, hidden_size] over k in its order, which `np.sum` need not keep."""
    delta = products[:, 0].copy()
    for k in range(1, products.shape[1]):
        delta += products[:, k]
    return delta


class ConvState(NamedTuple):
    """The newest rows of u of each page: that of position p at p % page_tokens % window.

    Besides the rows before the next token they are those that a sequence may go back.
    """

    rows: Floats  # [pages, window, hidden_size], window = kernel_size - 1 + STEP_BACK
    page_tokens: int

    def read(self, pages: Ints, positions: Any) -> Floats:
        """Return the rows of u of a sequence that has these pages."""
        return self.rows[self._at(pages, positions)]

    def write(self, pages: Ints, positions: Ints, u: Floats) -> None:
        """Keep a chunk's rows, but for those that a later one of their page would replace."""
        page_ends = (positions // self.page_tokens + 1) * self.page_tokens
        ends = np.minimum(page_ends, positions[-1] + 1)
        kept = positions >= ends - self.rows.shape[1]
        self.rows[self._at(pages, positions[kept])] = u[kept]

    def _at(self, pages: Ints, positions: Any) -> tuple[Ints, Ints]:
        """Return the page and the place there of each position."""
        page, token = np.divmod(positions, self.page_tokens)
        return pages[page], token % self.rows.shape[1]


class ShortConv:
    def __init__(self, spec: specs.ShortConv, weights: Weights) -> None:
        self.in_proj = Linear(weights.scope("in_proj"), spec.bias)
        self.out_proj = Linear(weights.scope("out_proj"), spec.bias)
        self.taps = weights.float32("conv.weight")[:, 0, :].T  # [kernel_size, hidden_size]
        self.bias = weights.float32("conv.bias") if spec.bias else np.float32(0)
        self.spec = spec

    def __call__(self, x: Floats, batch: Batch, state: ConvState | None) -> Floats:
        B, C, X = np.split(self.in_proj(x), 3, axis=1)
        u = B * X
        y: Floats = np.empty_like(u)
        for i, pages in enumerate(batch.pages):
            rows = slice(batch.cu_seqlens[i], batch.cu_seqlens[i + 1])
            past = self._past(state, pages, batch.positions[rows.start])
            seen = np.concatenate([past, u[rows]])
            tokens = len(seen) - len(past)
            y[rows] = sum(tap * seen[j : j + tokens] for j, tap in enumerate(self.taps))
            if state is not None:
                state.write(pages, batch.positions[rows], u[rows])
        return self.out_proj(C * (y + self.bias))

    def _past(self, state: ConvState | None, pages: Ints, position: int) -> Floats:
        """Return the rows of u before `position`; those before the sequence's start are zeros."""
        past = np.zeros((self.spec.kernel_size - 1, self.spec.hidden_size), np.float32)
        before = np.arange(position - len(past), position)
        if state is not None:
            past[before >= 0] = state.read(pages, before[before >= 0])
        return past

    def new_state(self, room: Room) -> ConvState:
        return ConvState(np.empty(_state_shape(self.spec, room), np.float32), room.page_tokens)


def _state_shape(spec: specs.ShortConv, room: Room) -> tuple[int, int, int]:
    return room.pages, spec.kernel_size - 1 + STEP_BACK, spec.hidden_size


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

    def kept_bytes(self, spec: Spec, weights: Weights) -> int:
        """Count weights that are widened to float32; others stay views of the checkpoint."""
        tensors = (weights[name] for name in spec.parameters())
        return sum(4 * t.size for t in tensors if t.format != F32)

    def kept_formats(self, spec: Spec, weights: Weights) -> dict[str, Format]:
        """Return F32 for every weight, because BLAS multiplies float32 alone."""
        return dict.fromkeys(spec.parameters(), F32)

    def scratch_bytes(self, spec: Spec, tokens: int) -> int:
        """Count the arrays that a block has at once between its products, in any batch."""
        return 4 * tokens * _floats_per_row(spec)

    def state_bytes(self, spec: Spec, room: Room) -> int:
        assert isinstance(spec, specs.ShortConv)
        return 4 * math.prod(_state_shape(spec, room))

    def notes(self) -> list[str]:
        blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
        notes = [f"NumPy's BLAS is {blas['name']} {blas['version']}"]
        if self.context.threads is not None or self.context.local_ranks > 1:
            notes.append("its threads are set by OPENBLAS_NUM_THREADS (or the like), not from here")
        return notes


def _floats_per_row(spec: Spec) -> int:
    match spec:
        case specs.ShortConv():
            return 6 * spec.hidden_size  # B, C, X, u, y and C * (y + bias)
        case specs.MLP():
            return 3 * spec.intermediate_size  # gate, silu and their product with w3
        case specs.Experts():
            return spec.num_experts_per_tok * spec.hidden_size  # the products
    return 0
