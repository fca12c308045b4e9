"""Builds the CUDA blocks: one class per spec, found in one table."""

from __future__ import annotations

from collections.abc import Callable

import cupy

from lfm2kit import specs
from lfm2kit.backend import (
    F32,
    Array,
    Batch,
    Block,
    Ceilings,
    Context,
    Format,
    Memory,
    Spec,
    Weights,
)
from lfm2kit.errors import Lfm2kitError
from lfm2kit_cuda.arithmetic import arithmetic
from lfm2kit_cuda.blocks.attention import Attention
from lfm2kit_cuda.blocks.feed_forward import MLP, Experts, SparseMoe
from lfm2kit_cuda.blocks.layer import PARTS, Layer
from lfm2kit_cuda.blocks.router import Router
from lfm2kit_cuda.blocks.rows import Embedding, LastRows, LMHead, RMSNorm
from lfm2kit_cuda.blocks.short_conv import ShortConv
from lfm2kit_cuda.capture import Replay
from lfm2kit_cuda.ceilings import measure_ceilings
from lfm2kit_cuda.device import choose_device
from lfm2kit_cuda.memory import CUDA
from lfm2kit_cuda.products import read_format

BLOCKS = {
    specs.Embedding: Embedding,
    specs.RMSNorm: RMSNorm,
    specs.ShortConv: ShortConv,
    specs.Attention: Attention,
    specs.MLP: MLP,
    specs.Router: Router,
    specs.Experts: Experts,
    specs.SparseMoe: SparseMoe,
    specs.LastRows: LastRows,
    specs.LMHead: LMHead,
    specs.Layer: Layer,
}


class CudaBackend:
    def __init__(self, context: Context) -> None:
        choose_device(context)
        self._gemm = arithmetic(context.precision)

    def why_unsupported(self, spec: Spec) -> str | None:
        if type(spec) not in BLOCKS:
            return "it builds blocks up to Layer"
        if isinstance(spec, specs.Layer):
            return self._why_not_whole(spec)
        return None

    def memory(self, spec: Spec) -> Memory:
        return CUDA

    def build(self, spec: Spec, weights: Weights) -> Block:
        try:
            block: Block = BLOCKS[type(spec)](spec, weights, self._gemm)
        except cupy.cuda.memory.OutOfMemoryError:
            raise Lfm2kitError(self._out_of_memory(spec)) from None
        return block

    def workspace_bytes(self, spec: Spec, weights: Weights, tokens: int) -> int:
        """The packed copy of every matrix; activations are a few arrays as large as x."""
        if isinstance(spec, specs.Embedding):
            return read_format(weights["weight"]).nbytes(weights["weight"].shape)
        return self._packed_bytes(spec)

    def kept_formats(self, spec: Spec, weights: Weights) -> dict[str, Format]:
        """Matrices as the precision packs them, a router's gate and all arrays in F32."""
        if isinstance(spec, specs.Embedding):
            return {"weight": read_format(weights["weight"])}
        return {
            name: self._gemm.packed_format
            if len(shape) == 2 and not name.endswith("gate.weight")
            else F32
            for name, shape in spec.parameters().items()
        }

    def _packed_bytes(self, spec: Spec) -> int:
        return sum(
            self._gemm.packed_bytes(shape)
            for leaf in specs.leaves(spec)
            for shape in leaf.parameters().values()
            if len(shape) == 2
        )

    def ceilings(self) -> Ceilings:
        return measure_ceilings()

    def _why_not_whole(self, layer: specs.Layer) -> str | None:
        """A layer is built whole where its norms have something to round."""
        if self._gemm.activation == "F32":
            return "in fp32 a layer is no faster whole"
        known = all(type(part.spec) in PARTS for part in layer.parts())
        return None if known else "its feed-forward is not one of ours"

    def capture(self, forward: Callable[[Batch], Array], batch: Batch) -> Replay:
        return Replay(forward, batch)

    def _out_of_memory(self, spec: Spec) -> str:
        free, total = (size / 1e9 for size in cupy.cuda.runtime.memGetInfo())
        smaller = "--precision bf16, or " if self._gemm.activation == "F32" else ""
        return (
            f"the GPU's memory does not hold the model: {free:.1f} of {total:.1f} GB are left, and "
            f"a block of kind '{spec.kind}' needs {1e-9 * self._packed_bytes(spec):.1f} GB; "
            f"try {smaller}--n-cpu-moe N, which keeps the experts of N layers on the CPU"
        )
