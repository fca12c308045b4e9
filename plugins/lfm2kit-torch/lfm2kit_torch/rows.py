"""The blocks that look at each row alone: embedding, norm, last rows, head."""

from __future__ import annotations

from torch import Tensor

from lfm2kit import specs
from lfm2kit.backend import Weights
from lfm2kit_torch.batches import TensorBatch
from lfm2kit_torch.device import Device
from lfm2kit_torch.linear import Linear, rms_norm, stored


class Embedding:
    def __init__(self, spec: specs.Embedding, weights: Weights, device: Device) -> None:
        self.weight = stored(weights, "weight", device)

    def __call__(self, batch: TensorBatch) -> Tensor:
        return self.weight[batch.token_ids].float()


class RMSNorm:
    def __init__(self, spec: specs.RMSNorm, weights: Weights, device: Device) -> None:
        self.weight = stored(weights, "weight", device)
        self.eps = spec.eps

    def __call__(self, hidden: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        hidden = hidden if delta is None else hidden + delta
        return hidden, rms_norm(hidden, self.weight, self.eps)


class LastRows:
    def __init__(self, spec: specs.LastRows, weights: Weights, device: Device) -> None:
        pass

    def __call__(self, hidden: Tensor, delta: Tensor, batch: TensorBatch) -> tuple[Tensor, Tensor]:
        return hidden[batch.logits_rows], delta[batch.logits_rows]


class LMHead(Linear):
    def __init__(self, spec: specs.LMHead, weights: Weights, device: Device) -> None:
        super().__init__(weights, device)
