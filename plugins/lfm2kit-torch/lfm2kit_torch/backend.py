"""Builds blocks of tensors, one class per spec, and hands them the arrays of a memory."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from lfm2kit import specs
from lfm2kit.backend import F32, Batch, Block, Format, Memory, Operator, Room, Spec, State, Weights
from lfm2kit_torch import attention, short_conv
from lfm2kit_torch.attention import Attention
from lfm2kit_torch.batches import TensorBatch
from lfm2kit_torch.device import Device
from lfm2kit_torch.feed_forward import MLP, Choice, Experts, Router, Scores
from lfm2kit_torch.linear import TYPES
from lfm2kit_torch.rows import Embedding, LastRows, LMHead, RMSNorm
from lfm2kit_torch.short_conv import ShortConv

BLOCKS: dict[type[Spec], Any] = {
    specs.Embedding: Embedding,
    specs.RMSNorm: RMSNorm,
    specs.ShortConv: ShortConv,
    specs.Attention: Attention,
    specs.MLP: MLP,
    specs.Scores: Scores,
    specs.Choice: Choice,
    specs.Router: Router,
    specs.Experts: Experts,
    specs.LastRows: LastRows,
    specs.LMHead: LMHead,
}


class OnArrays:
    """A block of tensors that takes and returns arrays, which share their memory."""

    def __init__(self, block: Any, device: Device) -> None:
        self._block = block
        self._device = device
        if isinstance(block, Operator):
            self.new_state = self._new_state

    def __call__(self, *inputs: Any) -> Any:
        with self._device.computing():
            results = self._block(*map(self._taken, inputs))
            if isinstance(results, Tensor):
                return self._device.array(results)
            return tuple(map(self._device.array, results))

    def _taken(self, given: Any) -> Any:
        if isinstance(given, Batch):
            return TensorBatch.of(given, self._device)
        is_array = hasattr(given, "__dlpack__")  # else it is a state, or None
        return self._device.tensor(given) if is_array else given

    def _new_state(self, room: Room) -> State:
        with self._device.building():
            return self._block.new_state(room)


class TorchBackend:
    def __init__(self, device: Device) -> None:
        self._device = device

    def why_unsupported(self, spec: Spec) -> str | None:
        return None if type(spec) in BLOCKS else "it builds blocks up to Router"

    def memory(self, spec: Spec) -> Memory:
        return self._device.memory

    def build(self, spec: Spec, weights: Weights) -> Block:
        with self._device.building():
            return OnArrays(BLOCKS[type(spec)](spec, weights, self._device), self._device)

    def why_not_captured(self, spec: Spec) -> str | None:
        return self._device.why_not_captured()

    def kept_bytes(self, spec: Spec, weights: Weights) -> int:
        """Count the weights that are copied: all on a GPU, else those that have to be widened."""
        kept = self.kept_formats(spec, weights)
        return sum(
            kept[name].nbytes(weights[name].shape)
            for name in spec.parameters()
            if self._device.copies_weights or kept[name] != weights[name].format
        )

    def kept_formats(self, spec: Spec, weights: Weights) -> dict[str, Format]:
        """Return each weight's own format if PyTorch has such a type, else F32."""
        formats = {name: weights[name].format for name in spec.parameters()}
        return {name: own if own in TYPES else F32 for name, own in formats.items()}

    def scratch_bytes(self, spec: Spec, tokens: int) -> int:
        """Count the arrays that a block has at once, and the largest matrix as widened.

        Only matrices of 16 bits are widened in a call, but the formats are not known here.
        """
        if isinstance(spec, specs.Embedding) or tokens == 0:
            return 0
        widened = 4 * max((math.prod(shape) for shape in spec.parameters().values()), default=0)
        if isinstance(spec, specs.Attention):
            return widened + attention.scratch_bytes(spec, tokens)
        return widened + 4 * tokens * _floats_per_row(spec)

    def state_bytes(self, spec: Spec, room: Room) -> int:
        if isinstance(spec, specs.ShortConv):
            return 4 * math.prod(short_conv.state_shape(spec, room))
        assert isinstance(spec, specs.Attention)
        return 2 * 4 * math.prod(attention.state_shape(spec, room))

    def notes(self) -> list[str]:
        return self._device.notes()


def _floats_per_row(spec: Spec) -> int:
    match spec:
        case specs.ShortConv():
            return 5 * spec.hidden_size  # B, C, X, u and y
        case specs.MLP():
            return 2 * spec.intermediate_size  # gate and up
        case specs.Experts():
            return spec.num_experts_per_tok * spec.hidden_size  # the products
    return 0
