"""Builds the SIMD blocks: one class per spec, found in one table.

Kernels are compiled where they stand, when their module is imported: that happens with the first
block that is built, and not before.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from lfm2kit import specs
from lfm2kit.backend import (
    HOST,
    Block,
    Ceilings,
    Context,
    DType,
    Memory,
    Spec,
    Tensor,
    Weights,
)
from lfm2kit.errors import Lfm2kitError, Option
from lfm2kit.weights import STORED_AS
from lfm2kit_cpu_simd.compiling import announced
from lfm2kit_cpu_simd.crew import set_threads
from lfm2kit_cpu_simd.machine import STORAGES
from lfm2kit_cpu_simd.threads import threading_notes

# The module of each spec's class, which has the spec's name.
BLOCKS = {
    specs.Embedding: "blocks.rows",
    specs.RMSNorm: "blocks.rows",
    specs.ShortConv: "blocks.short_conv",
    specs.Attention: "blocks.attention",
    specs.MLP: "blocks.feed_forward",
    specs.Scores: "blocks.router",
    specs.Choice: "blocks.router",
    specs.Router: "blocks.router",
    specs.Experts: "blocks.feed_forward",
    specs.SparseMoe: "blocks.feed_forward",
    specs.LastRows: "blocks.rows",
    specs.LMHead: "blocks.rows",
}

MODULES = sorted({*BLOCKS.values(), "ceilings"})

# The type that matrices are rounded to; in fp32 they stay as the checkpoint has them.
STORED: dict[str, DType | None] = {"fp32": None, "bf16": "BF16", "fp16": "F16"}


class CpuSimdBackend:
    def __init__(self, context: Context) -> None:
        set_threads(context)
        self._is_quiet = context.local_rank > 0  # one rank of each machine prints that it compiles
        self._dtype = STORED[context.precision]
        if self._dtype not in (None, *STORAGES):
            raise Lfm2kitError(
                Option("precision", context.precision),
                f": this CPU cannot widen {self._dtype}; try ",
                Option("precision", "bf16"),
            )

    def why_unsupported(self, spec: Spec) -> str | None:
        return None if type(spec) in BLOCKS else "it builds blocks up to SparseMoe"

    def memory(self, spec: Spec) -> Memory:
        return HOST

    def build(self, spec: Spec, weights: Weights) -> Block:
        module = self._compiled(BLOCKS[type(spec)])
        block: Block = getattr(module, type(spec).__name__)(spec, weights, self._dtype)
        return block

    def workspace_bytes(self, spec: Spec, weights: Weights, tokens: int) -> int:
        """The packed weights, and the activations between a block's kernels."""
        kept = sum(self._kept_bytes(name, weights[name]) for name in spec.parameters())
        if isinstance(spec, specs.Embedding):
            kept = 0  # a view of the checkpoint
        return kept + sum(4 * tokens * _floats_per_row(leaf) for leaf in specs.leaves(spec))

    def _kept_bytes(self, name: str, tensor: Tensor) -> int:
        """Returns a matrix's bytes without the padding of its panels, or an array's in float32."""
        if tensor.data.ndim != 2:
            return 4 * tensor.data.size
        rounded = None if name == "gate.weight" else self._dtype  # no precision rounds a router
        storage = rounded or (tensor.dtype if tensor.dtype in STORAGES else "F32")
        return tensor.data.size * STORED_AS[storage].itemsize

    def notes(self) -> list[str]:
        return threading_notes()

    def ceilings(self) -> Ceilings:
        ceilings = self._compiled("ceilings")
        return Ceilings(ceilings.flops_per_second(), ceilings.bytes_per_second())

    def _compiled(self, module: str) -> ModuleType:
        """Returns a module with its kernels; the first call compiles those of all modules."""
        with announced(is_quiet=self._is_quiet):
            modules = {name: import_module(f"lfm2kit_cpu_simd.{name}") for name in MODULES}
        return modules[module]


def _floats_per_row(spec: Spec) -> int:
    """What a block keeps of each row at once, beside its arguments and its result."""
    match spec:
        case specs.ShortConv():
            return 4 * spec.hidden_size
        case specs.Attention():
            heads = 2 * spec.num_attention_heads + 4 * spec.num_key_value_heads
            return heads * spec.head_dim
        case specs.MLP():
            return spec.intermediate_size
        case specs.Experts():
            return spec.num_experts_per_tok * (2 * spec.hidden_size + spec.intermediate_size)
    return 0
