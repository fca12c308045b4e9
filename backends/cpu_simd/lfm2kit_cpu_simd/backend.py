"""Builds the SIMD blocks: one class per spec, found in one table.

Kernels are compiled where they stand, when their module is imported: that happens with the first
block that is built, and not before.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from lfm2kit import specs
from lfm2kit.backend import (
    BF16,
    F16,
    F32,
    HOST,
    Block,
    Ceilings,
    Context,
    Format,
    Memory,
    Spec,
    Tensor,
    Weights,
)
from lfm2kit.errors import Lfm2kitError
from lfm2kit_cpu_simd.compiling import announced
from lfm2kit_cpu_simd.crew import set_threads
from lfm2kit_cpu_simd.machine import STORAGES, common_storage
from lfm2kit_cpu_simd.threads import threading_notes

# The module of each spec's class, which has the spec's name.
BLOCKS = {
    specs.Embedding: "blocks.rows",
    specs.RMSNorm: "blocks.rows",
    specs.ShortConv: "blocks.short_conv",
    specs.Attention: "blocks.attention",
    specs.MLP: "blocks.feed_forward",
    specs.Router: "blocks.router",
    specs.Experts: "blocks.feed_forward",
    specs.SparseMoe: "blocks.feed_forward",
    specs.LastRows: "blocks.rows",
    specs.LMHead: "blocks.rows",
}

MODULES = sorted({*BLOCKS.values(), "ceilings"})

# The format that matrices are rounded to; in fp32 they stay as the checkpoint has them.
ROUNDED_TO: dict[str, Format | None] = {"fp32": None, "bf16": BF16, "fp16": F16}


class CpuSimdBackend:
    def __init__(self, context: Context) -> None:
        set_threads(context)
        self._is_quiet = context.local_rank > 0  # one rank of each machine prints that it compiles
        self._format = ROUNDED_TO[context.precision]
        if self._format not in (None, *STORAGES):
            raise Lfm2kitError(
                f"--precision {context.precision}: this CPU cannot widen {self._format}; try bf16"
            )

    def why_unsupported(self, spec: Spec) -> str | None:
        return None if type(spec) in BLOCKS else "it builds blocks up to SparseMoe"

    def memory(self, spec: Spec) -> Memory:
        return HOST

    def build(self, spec: Spec, weights: Weights) -> Block:
        module = self._compiled(BLOCKS[type(spec)])
        block: Block = getattr(module, type(spec).__name__)(spec, weights, self._format)
        return block

    def workspace_bytes(self, spec: Spec, weights: Weights, tokens: int) -> int:
        """The packed weights, and the activations between a block's kernels."""
        kept = self._kept_bytes(spec, weights)
        return kept + sum(4 * tokens * _floats_per_row(leaf) for leaf in specs.leaves(spec))

    def kept_formats(self, spec: Spec, weights: Weights) -> dict[str, Format]:
        """Matrices of a common format stay in it, if kernels take it; the rest is F32."""
        shapes = spec.parameters()
        if isinstance(spec, specs.Embedding):
            return {name: weights[name].format for name in shapes}
        together: dict[str, list[Tensor]] = {}
        for name in (name for name, shape in shapes.items() if len(shape) == 2):
            together.setdefault(_packed_with(name), []).append(weights[name])
        packed = {word: self._packed_format(word, tensors) for word, tensors in together.items()}
        return {name: packed.get(_packed_with(name), F32) for name in shapes}

    def _packed_format(self, word: str, matrices: list[Tensor]) -> Format:
        if self._format is None or word == "gate":  # no precision rounds a router
            return common_storage(matrices)
        return self._format

    def _kept_bytes(self, spec: Spec, weights: Weights) -> int:
        """Returns the bytes of packed matrices, without their panels' padding, and of arrays."""
        if isinstance(spec, specs.Embedding):
            return 0  # a view of the checkpoint
        formats, shapes = self.kept_formats(spec, weights), spec.parameters()
        return sum(format.nbytes(shapes[name]) for name, format in formats.items())

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


def _packed_with(name: str) -> str:
    """Returns the last word of a matrix's name, or of the matrix that it is packed with."""
    word = name.removesuffix(".weight").rpartition(".")[2]
    return {"k_proj": "q_proj", "v_proj": "q_proj", "w3": "w1"}.get(word, word)


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
