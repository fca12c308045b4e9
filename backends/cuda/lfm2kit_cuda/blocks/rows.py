"""The blocks that look at each row alone: embedding, norm, last rows, head."""

from __future__ import annotations

import cupy

from lfm2kit import specs
from lfm2kit.backend import Batch, Weights
from lfm2kit_cuda.constants import ROWS
from lfm2kit_cuda.kernels import Kernel, load_kernel
from lfm2kit_cuda.products import Activations, Arithmetic, readable
from lfm2kit_cuda.upload import upload

SOURCE, THREADS = "blocks/rows", ROWS.NORM_THREADS


class Embedding:
    """An embedding whose table stays as stored; rows are widened when they are looked up."""

    def __init__(self, spec: specs.Embedding, weights: Weights, gemm: Arithmetic) -> None:
        table = readable(weights["weight"])
        self.table = upload(table.data)
        self.kernel = _kernel(f"embed_{table.format}", spec.hidden_size)

    def __call__(self, batch: Batch) -> cupy.ndarray:
        hidden = cupy.empty((batch.tokens, self.table.shape[1]), cupy.float32)
        of_rows = batch.token_ids, batch.positions
        arguments = self.table, *of_rows, hidden, self.table.shape[1]
        self.kernel((batch.tokens,), THREADS, *arguments)
        return hidden


class RMSNorm:
    """A norm that adds `delta` into `hidden` in place."""

    def __init__(self, spec: specs.RMSNorm, weights: Weights, gemm: Arithmetic) -> None:
        self.spec = spec
        self.gemm = gemm
        self.weight = upload(weights.float32("weight"))
        self.kernel = _kernel("add_norm", spec.hidden_size, gemm.activation)

    def __call__(
        self, hidden: cupy.ndarray, delta: cupy.ndarray | None
    ) -> tuple[cupy.ndarray, cupy.ndarray]:
        x = cupy.empty_like(hidden)
        self.kernel((len(hidden),), THREADS, hidden, delta, self.weight, x, None, 0, self.spec.eps)
        return hidden, x

    def rounded(
        self, hidden: cupy.ndarray, delta: cupy.ndarray | None, *, is_routed: bool
    ) -> tuple[cupy.ndarray, Activations]:
        """Do what a call does, and round x for products in the same pass.

        If `is_routed`, x is returned in float32 too, for a router.
        """
        if self.gemm.activation == "F32":
            hidden, x = self(hidden, delta)
            return hidden, Activations(x, self.gemm.rounded(x))
        x = cupy.empty_like(hidden) if is_routed else None
        rounded = self.gemm.empty(len(hidden), self.spec.hidden_size)
        self.kernel(
            (len(hidden),), THREADS, hidden, delta, self.weight, x, rounded.array, rounded.extent,
            self.spec.eps,
        )  # fmt: skip
        return hidden, Activations(x, rounded)


class LastRows:
    def __init__(self, spec: specs.LastRows, weights: Weights, gemm: Arithmetic) -> None:
        self.hidden_size = spec.hidden_size
        self.kernel = _kernel("last_rows", spec.hidden_size)

    def __call__(
        self, hidden: cupy.ndarray, delta: cupy.ndarray, batch: Batch
    ) -> tuple[cupy.ndarray, cupy.ndarray]:
        rows = batch.logits_rows
        last = [cupy.empty((len(rows), self.hidden_size), cupy.float32) for _ in range(2)]
        self.kernel((len(rows),), THREADS, hidden, delta, rows, *last, self.hidden_size)
        return last[0], last[1]


class LMHead:
    def __init__(self, spec: specs.LMHead, weights: Weights, gemm: Arithmetic) -> None:
        self.gemm = gemm
        self.weight = gemm.pack([weights["weight"]])

    def __call__(self, x: cupy.ndarray) -> cupy.ndarray:
        return self.gemm.linear(self.gemm.rounded(x), self.weight)


def _kernel(name: str, hidden_size: int, activation: str = "F32") -> Kernel:
    vector = 4 if hidden_size % 4 == 0 else 1
    return load_kernel(SOURCE, name, HIDDEN=hidden_size, VECTOR=vector, OUT=activation)
