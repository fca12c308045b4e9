"""Weights as the checkpoint stores them, and the matrix product."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lfm2kit.backend import BF16, F16, F32, Weights
from lfm2kit_torch.device import Device

TYPES = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}


def stored(weights: Weights, name: str, device: Device) -> Tensor:
    """Return a weight in its own type if PyTorch has that, else in float32.  Blocks widen it."""
    weight = weights[name]
    if weight.format not in TYPES:
        return device.weight(weight.float32())
    return device.weight(weight.data).view(TYPES[weight.format])


class Linear:
    """x @ weight.T + bias, weight [out, in]."""

    def __init__(self, weights: Weights, device: Device, bias: bool = False) -> None:
        self.weight = stored(weights, "weight", device)
        self.bias = stored(weights, "bias", device).float() if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.float(), self.bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last axis.

    The mean is of doubles: of large numbers, float32 would divide the row by an infinity.
    """
    mean_square = x.double().square().mean(-1, keepdim=True)
    return x / torch.sqrt(mean_square + eps).float() * weight.float()
