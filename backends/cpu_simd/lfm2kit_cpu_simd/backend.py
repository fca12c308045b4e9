"""Builds the SIMD blocks: one class per spec, found in one table."""

from __future__ import annotations

from lfm2kit import specs
from lfm2kit.backend import HOST, Block, Ceilings, Context, DType, Memory, Spec, Weights
from lfm2kit.errors import Lfm2kitError
from lfm2kit_cpu_simd.compiling import compiled_kernels
from lfm2kit_cpu_simd.threads import set_threads, threading_notes

with compiled_kernels():
    from lfm2kit_cpu_simd import ceilings
    from lfm2kit_cpu_simd.blocks.attention import Attention
    from lfm2kit_cpu_simd.blocks.feed_forward import MLP, Experts, SparseMoe
    from lfm2kit_cpu_simd.blocks.router import Router
    from lfm2kit_cpu_simd.blocks.rows import Embedding, LastRows, LMHead, RMSNorm
    from lfm2kit_cpu_simd.blocks.short_conv import ShortConv
    from lfm2kit_cpu_simd.tile import STORAGES

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
}


# The type that matrices are rounded to; in fp32 they stay as the checkpoint has them.
STORED: dict[str, DType | None] = {"fp32": None, "bf16": "BF16", "fp16": "F16"}


class CpuSimdBackend:
    def __init__(self, context: Context) -> None:
        set_threads(context)
        self._dtype = STORED[context.precision]
        if self._dtype not in (None, *STORAGES):
            raise Lfm2kitError(
                f"--precision {context.precision}: this CPU cannot widen {self._dtype}; try bf16"
            )

    def why_unsupported(self, spec: Spec) -> str | None:
        return None if type(spec) in BLOCKS else "it builds blocks up to SparseMoe"

    def memory(self, spec: Spec) -> Memory:
        return HOST

    def build(self, spec: Spec, weights: Weights) -> Block:
        block: Block = BLOCKS[type(spec)](spec, weights, self._dtype)
        return block

    def workspace_bytes(self, spec: Spec, tokens: int) -> int:
        """Activations between a block's kernels; packed weights take the place of mapped ones."""
        return sum(4 * tokens * _floats_per_row(leaf) for leaf in specs.leaves(spec))

    def notes(self) -> list[str]:
        return threading_notes()

    def ceilings(self) -> Ceilings:
        return Ceilings(ceilings.flops_per_second(), ceilings.bytes_per_second())


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
