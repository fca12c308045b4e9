"""Builds the CUDA blocks: one class per spec, found in one table."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence

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
    Room,
    Spec,
    Weights,
)
from lfm2kit.building.byte_counts import size
from lfm2kit.errors import Lfm2kitError, Option
from lfm2kit.rewrites import StreamedExperts
from lfm2kit_cuda.arithmetic import arithmetic
from lfm2kit_cuda.blocks.attention import Attention
from lfm2kit_cuda.blocks.feed_forward import MLP, Experts, SparseMoe
from lfm2kit_cuda.blocks.layer import CHOICE, PARTS, Layer
from lfm2kit_cuda.blocks.on_device import OnDevice
from lfm2kit_cuda.blocks.router import Choice, Router, Scores
from lfm2kit_cuda.blocks.rows import Embedding, LastRows, LMHead, RMSNorm
from lfm2kit_cuda.blocks.short_conv import ShortConv
from lfm2kit_cuda.blocks.streamed import StreamedExperts as Streamed
from lfm2kit_cuda.capture import Replay
from lfm2kit_cuda.ceilings import bytes_per_second
from lfm2kit_cuda.choosing import hardware
from lfm2kit_cuda.device import choose_device, on_device
from lfm2kit_cuda.figures import Figures
from lfm2kit_cuda.gemm16 import HALVES
from lfm2kit_cuda.memory import memory_of
from lfm2kit_cuda.paging import state_bytes
from lfm2kit_cuda.products import read_format
from lfm2kit_cuda.sampling import Sampler
from lfm2kit_cuda.slots import Slots

MOST_SPARE = 1 << 28  # bytes that the pool keeps when a block has been built

BLOCKS = {
    specs.Embedding: Embedding,
    specs.RMSNorm: RMSNorm,
    specs.ShortConv: ShortConv,
    specs.Attention: Attention,
    specs.MLP: MLP,
    specs.Scores: Scores,
    specs.Choice: Choice,
    specs.Router: Router,
    specs.Experts: Experts,
    specs.SparseMoe: SparseMoe,
    specs.LastRows: LastRows,
    specs.LMHead: LMHead,
    specs.Layer: Layer,
}


def _give_back_spare_memory() -> None:
    """Give back what packing weights has left in the current device's pool, if it is much.

    A model that is built for a limit of memory must not take more on the way.
    """
    pool = cupy.get_default_memory_pool()
    if pool.free_bytes() > MOST_SPARE:
        pool.free_all_blocks()


class CudaBackend:
    """A backend for one device; what it has built may be called from any thread."""

    def __init__(self, context: Context) -> None:
        self._memory = memory_of(choose_device(context))
        with on_device(self._memory.device):
            self._gemm = arithmetic(context.precision)
            self._figures = Figures(self._gemm)
        # Those of the model that is being built; its blocks keep them.
        self._slots: Callable[[], Slots | None] = lambda: None

    def why_unsupported(self, spec: Spec) -> str | None:
        if type(spec) not in BLOCKS and not isinstance(spec, StreamedExperts):
            return "it builds blocks up to Layer"
        if isinstance(spec, specs.Layer):
            return self._why_not_whole(spec)
        return None

    def memory(self, spec: Spec) -> Memory:
        return self._memory

    def build(self, spec: Spec, weights: Weights) -> Block:
        if isinstance(spec, StreamedExperts):
            return self._built(spec, weights, lambda: self._streamed(spec, weights))
        return self._built(spec, weights, lambda: BLOCKS[type(spec)](spec, weights, self._gemm))

    def why_not_around(self, spec: Spec, parts: Sequence[str]) -> str | None:
        if not isinstance(spec, specs.Layer) or tuple(parts) != (CHOICE,):
            return f"it builds a Layer around its {CHOICE}, but nothing else around parts"
        return self._why_not_whole(spec)

    def build_around(self, spec: Spec, weights: Weights, parts: Mapping[str, Block]) -> Block:
        assert isinstance(spec, specs.Layer)
        return self._built(spec, weights, lambda: Layer(spec, weights, self._gemm, parts))

    def _streamed(self, spec: StreamedExperts, weights: Weights) -> Streamed:
        """Return a block with the slots of the one before, unless it is the first of a model."""
        slots = self._slots() if spec.position > 0 else None
        block = Streamed(spec, weights, self._gemm, slots)
        self._slots = weakref.ref(block.slots)
        return block

    def _built(self, spec: Spec, weights: Weights, make: Callable[[], Block]) -> Block:
        with self._memory.stream():
            try:
                block = make()
            except cupy.cuda.memory.OutOfMemoryError:
                raise self._out_of_memory(spec, weights) from None
            cupy.cuda.get_current_stream().synchronize()  # so that any stream finds its weights
            _give_back_spare_memory()
        return OnDevice(block, self._memory.device)

    def kept_bytes(self, spec: Spec, weights: Weights) -> int:
        with on_device(self._memory.device):
            return self._figures.kept(spec, weights)

    def pinned_bytes(self, spec: Spec, weights: Weights) -> int:
        return self._figures.pinned(spec)

    def kept_formats(self, spec: Spec, weights: Weights) -> dict[str, Format]:
        """Return the precision's packed format for matrices, and F32 for gates and other arrays."""
        if isinstance(spec, specs.Embedding):
            return {"weight": read_format(weights["weight"])}
        return {
            name: self._gemm.packed_format
            if len(shape) == 2 and not name.endswith("gate.weight")
            else F32
            for name, shape in spec.parameters().items()
        }

    def row_format(self, spec: Spec) -> Format:
        """Return the precision's activations for experts: other blocks round on their own."""
        is_of_experts = isinstance(spec, specs.Experts | StreamedExperts)
        return HALVES.get(self._gemm.activation, F32) if is_of_experts else F32

    def scratch_bytes(self, spec: Spec, tokens: int) -> int:
        with on_device(self._memory.device):
            return self._figures.scratch(spec, tokens)

    def state_bytes(self, spec: Spec, room: Room) -> int:
        return state_bytes(spec, room, itemsize=self._figures.itemsize)

    def sampler(self) -> Sampler:
        return Sampler(self._memory)

    def ceilings(self) -> Ceilings:
        with self._memory.stream():
            return Ceilings(self._gemm.flops_per_second(), bytes_per_second())

    def hardware(self) -> dict[str, str]:
        return {**hardware(self._memory.device), "CuPy": cupy.__version__}

    def _why_not_whole(self, layer: specs.Layer) -> str | None:
        """Return why a layer is not built whole: its norms must have something to round."""
        if self._gemm.activation == "F32":
            return "in fp32 a layer built whole is not faster"
        known = all(type(part.spec) in PARTS for part in layer.parts())
        return None if known else "its feed-forward is not one of ours"

    def takes_padding(self, spec: Spec) -> bool:
        return type(spec) in BLOCKS

    def capture(self, step: Callable[[Batch], Array], batch: Batch) -> Replay:
        try:
            return Replay(step, batch, self._memory)
        except MemoryError:
            pass  # outside the handler, whose error holds arrays
        # A replay has a pool of its own, so what the common pool keeps for later is in its way.
        cupy.get_default_memory_pool().free_all_blocks()
        return Replay(step, batch, self._memory)

    def _out_of_memory(self, spec: Spec, weights: Weights) -> Lfm2kitError:
        free, total = map(size, cupy.cuda.runtime.memGetInfo())
        needed = size(self.kept_bytes(spec, weights))
        is_fp32 = self._gemm.activation == "F32"
        return Lfm2kitError(
            f"the GPU's memory does not hold the model: {free} of {total} are left, and "
            f"a block of kind '{spec.kind}' needs {needed}; try ",
            *((Option("precision", "bf16"), ", or ") if is_fp32 else ()),
            Option("n_cpu_moe"),
            ", which keeps the experts of some layers on the CPU",
        )
