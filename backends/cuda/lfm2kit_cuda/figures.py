"""How much memory blocks take: the weights that they keep, and what a call needs while it runs.

Each figure follows the block's code: what it allocates, and what of it is still referred to at the
worst moment.  CuPy's pool rounds each array up to 512 bytes, which is not counted.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

from lfm2kit import specs
from lfm2kit.backend import Weights
from lfm2kit.rewrites import StreamedExperts
from lfm2kit.specs import Spec
from lfm2kit_cuda.blocks.grouping import ALIGNMENT, are_grouped_at_once
from lfm2kit_cuda.blocks.router import SPLITS
from lfm2kit_cuda.products import Arithmetic, Listed, padded, read_format


class Figures:
    """The figures of one precision's blocks."""

    def __init__(self, gemm: Arithmetic) -> None:
        self._gemm = gemm
        self.itemsize = 4 if gemm.activation == "F32" else 2  # of what a block stores inside
        self._down = 2 if gemm.activation == "BF16" else 4  # of experts' results

    def kept(self, spec: Spec, weights: Weights) -> int:
        """Return the bytes of the weights that a block keeps."""
        if isinstance(spec, specs.Embedding):
            table = weights["weight"]  # it stays as it is stored, if kernels read its format
            return read_format(table).nbytes(table.shape)
        if isinstance(spec, StreamedExperts):  # all of the model's share the first one's slots
            count = spec.slots * spec.experts_per_slot if spec.position == 0 else 0
            return count * self._gated_weights(spec.experts.expert)
        return sum(self._kept(leaf) for leaf in specs.leaves(spec))

    def pinned(self, spec: Spec) -> int:
        """Return the bytes of the weights that a block keeps in pinned memory of the host."""
        if not isinstance(spec, StreamedExperts):
            return 0
        return len(spec.experts.local_experts) * self._gated_weights(spec.experts.expert)

    def scratch(self, spec: Spec, tokens: int) -> int:
        """Return the bytes that a call with this many rows needs beside arguments and result."""
        if isinstance(spec, specs.Layer):
            return self._layer(spec, tokens)
        if isinstance(spec, StreamedExperts):
            return self._streamed(spec, tokens)
        if isinstance(spec, specs.Router | specs.Scores):
            return 4 * SPLITS * tokens * spec.num_experts
        if isinstance(spec, specs.LMHead):
            rounded = self._gemm.rounded_bytes(tokens, spec.hidden_size)
            return rounded + self._gemm.arranged_bytes(tokens, spec.hidden_size, spec.vocab_size)
        if isinstance(spec, specs.Embedding | specs.RMSNorm | specs.LastRows | specs.Choice):
            return 0
        return self._rounded(spec, tokens) + self._after_rounding(spec, tokens)

    def _kept(self, leaf: Spec) -> int:
        """Return the bytes of a block without parts: matrices are packed, the rest is float32."""
        packed, shapes = self._gemm.packed_bytes, leaf.parameters()
        if isinstance(leaf, specs.Attention):
            queries = leaf.num_attention_heads * leaf.head_dim
            rows = queries + 2 * leaf.num_key_value_heads * leaf.head_dim
            matrices = packed((rows, leaf.hidden_size)) + packed((leaf.hidden_size, queries))
        elif isinstance(leaf, specs.MLP):
            matrices = self._gated_weights(leaf)
        elif isinstance(leaf, specs.Experts):
            return len(leaf.local_experts) * self._gated_weights(leaf.expert)
        else:
            of_matrices = [shape for name, shape in shapes.items() if _is_matrix(name, shape)]
            matrices = sum(map(packed, of_matrices))
        rest = (prod(shape) for name, shape in shapes.items() if not _is_matrix(name, shape))
        return matrices + 4 * sum(rest)

    def _gated_weights(self, mlp: specs.MLP) -> int:
        packed, h, inner = self._gemm.packed_bytes, mlp.hidden_size, mlp.intermediate_size
        return packed((2 * padded(inner, self._gemm.run), h)) + packed((h, inner))

    def _rounded(self, spec: Spec, tokens: int) -> int:
        """Return the bytes of a block's input as products read it."""
        return self._gemm.rounded_bytes(tokens, _hidden_size(spec))

    def _after_rounding(self, spec: Spec, tokens: int) -> int:
        """Return what a block needs once its input is rounded."""
        if isinstance(spec, specs.Attention):
            return self._attention(spec, tokens)
        if isinstance(spec, specs.ShortConv):
            return self._short_conv(spec, tokens)
        if isinstance(spec, specs.MLP):
            return self._gated(tokens, spec.hidden_size, spec.intermediate_size)
        if isinstance(spec, specs.Experts):
            return self._experts(spec, tokens)
        assert isinstance(spec, specs.SparseMoe)
        return self._sparse_moe(spec, tokens)

    def _sparse_moe(self, spec: specs.SparseMoe, tokens: int) -> int:
        """Return what the sums of logits take beside the choice, or later the experts beside it."""
        routing = 8 * tokens * spec.router.num_experts_per_tok  # ids and weights
        sums = self.scratch(spec.router, tokens)
        if are_grouped_at_once(spec, tokens):
            sums += self._lists(spec.experts, tokens)
        return routing + max(sums, self._experts(spec.experts, tokens))

    def _attention(self, spec: specs.Attention, tokens: int) -> int:
        h, heads = spec.hidden_size, spec.num_attention_heads * spec.head_dim
        columns = heads + 2 * spec.num_key_value_heads * spec.head_dim
        qkv = self.itemsize * tokens * columns
        return qkv + self._between(tokens, (h, columns), (heads, h))

    def _short_conv(self, spec: specs.ShortConv, tokens: int) -> int:
        h = spec.hidden_size
        return self.itemsize * tokens * 3 * h + self._between(tokens, (h, 3 * h), (h, h))

    def _between(self, tokens: int, first: tuple[int, int], second: tuple[int, int]) -> int:
        """Return what two products need beside the first one's result: inputs and columns of each.

        What the block makes of that result is the second one's input.
        """
        kept = self._gemm.empty_bytes(tokens, second[0])
        arranged = (self._gemm.arranged_bytes(tokens, *product) for product in (first, second))
        return max(next(arranged), kept + next(arranged))

    def _gated(self, rows: int, hidden: int, inner: int, tiles: Listed | None = None) -> int:
        """Return what SwiGLU's product takes: its input arranged, and its result."""
        width = 2 * padded(inner, self._gemm.run)
        arranged = self._gemm.arranged_bytes(rows, hidden, width, tiles)
        return arranged + self._gemm.gated_bytes(rows, inner, tiles)

    def _experts(self, spec: specs.Experts, tokens: int) -> int:
        pairs, groups = tokens * spec.num_experts_per_tok, len(spec.local_experts)
        if not pairs or not groups:
            return 0
        slots, tiles = self._slots_and_tiles(pairs, groups)
        h, inner = spec.hidden_size, spec.intermediate_size
        gated = self._gemm.gated_bytes(slots, inner, tiles)
        outputs = self._down * slots * h
        products = max(self._gated(slots, h, inner, tiles), gated + outputs)
        return self._lists(spec, tokens) + products

    def _lists(self, spec: specs.Experts, tokens: int) -> int:
        """Return the bytes of the lists that pairs are grouped by expert with."""
        pairs = tokens * spec.num_experts_per_tok
        slots, tiles = self._slots_and_tiles(pairs, len(spec.local_experts))
        return 4 * (slots + pairs) + 16 * tiles.most

    def _slots_and_tiles(self, pairs: int, groups: int) -> tuple[int, Listed]:
        slots = padded(pairs + (ALIGNMENT - 1) * min(pairs, groups), ALIGNMENT)
        tiling = self._gemm.tiling(pairs, groups)
        return slots, Listed(tiling, min(pairs, pairs // tiling.rows + groups))

    def _streamed(self, spec: StreamedExperts, tokens: int) -> int:
        """Return what the largest portion needs, beside the sum of those before and its own."""
        largest = replace(spec.experts, local_experts=spec.portions[0])
        sums = 8 * tokens * spec.experts.hidden_size if len(spec.portions) > 1 else 0
        return self._rounded(largest, tokens) + self._experts(largest, tokens) + sums

    def _layer(self, spec: specs.Layer, tokens: int) -> int:
        """Return what a layer needs that is built whole: its norms round in the same pass."""
        ffn, x = spec.feed_forward, 4 * tokens * spec.operator_norm.hidden_size
        rounded = self._rounded(spec.operator, tokens)
        for_router = x if isinstance(ffn, specs.SparseMoe) else 0
        second = x + for_router + self._after_rounding(ffn, tokens)  # x: the operator's result
        return rounded + max(self._after_rounding(spec.operator, tokens), second)


def _is_matrix(name: str, shape: specs.Shape) -> bool:
    """Return whether a weight is packed for products; a router's gate stays in float32."""
    return len(shape) == 2 and name != "gate.weight"


def _hidden_size(spec: Spec) -> int:
    owner = spec.experts if isinstance(spec, specs.SparseMoe) else spec
    size: int = owner.hidden_size  # type: ignore[attr-defined]
    return size
