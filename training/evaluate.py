"""Measures a network on held-out text: bits per byte, and how even its experts' load is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from training.data import HELD_OUT, Part
from training.network import Network

BATCH = 16


@torch.no_grad()
def bits_per_byte(
    network: Network, parts: Mapping[str, Part], length: int, bos: int, every: int = 1
) -> dict[str, float]:
    """Return the bits per byte of each held-out part, and of all of them under "all".

    A token is judged given the BOS and between length / 2 and length tokens before it (at the
    beginning of a part: all there are). Each token counts once. With `every` above 1, one of that
    many windows is judged, for an estimate.
    """
    was_training = network.training
    network.eval()
    bits, sizes = 0.0, 0
    each = {}
    for name in HELD_OUT:
        part = parts[name]
        of_part = _nats_of_a_token(network, part, length, bos, every) * len(part.ids) / math.log(2)
        each[name] = of_part / part.nbytes
        bits, sizes = bits + of_part, sizes + part.nbytes
    network.train(was_training)
    return {"all": bits / sizes} | each


def _nats_of_a_token(network: Network, part: Part, length: int, bos: int, every: int) -> float:
    """Return the mean negative log-likelihood of a token."""
    device = network.embed_tokens.weight.device
    windows = list(_windows(part.ids.astype(np.int64), length, bos))[::every]
    total, count = 0.0, 0
    for i in range(0, len(windows), BATCH):
        inputs, targets = (
            torch.tensor(np.stack(rows), device=device)
            for rows in zip(*windows[i : i + BATCH], strict=True)
        )
        logits = network(inputs).flatten(0, 1)
        loss = functional.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="sum")
        total += loss.item()
        count += int((targets >= 0).sum())
    return total / count


def _windows(ids: Any, length: int, bos: int) -> Iterator[tuple[Any, Any]]:
    """Yield inputs and targets, int64 [length]; a target of -1 is not counted.

    Of all windows but the first, the first half is context only.
    """
    half = length // 2
    for begin in range(0, max(1, len(ids) - half), half):
        targets = np.full(length, -1)
        there = ids[begin : begin + length]
        inputs = np.full(length, bos)
        inputs[1 : len(there)] = there[:-1]
        targets[: len(there)] = there
        if begin:
            targets[:half] = -1
        yield inputs, targets


def forget_loads(network: Network) -> None:
    """Begin to count anew how many tokens each expert gets."""
    for router in network.routers().values():
        router.load.zero_()


def expert_loads(network: Network) -> list[dict[str, Any]]:
    """Return, for each layer with experts, how the tokens since then were shared out among them."""
    return [
        {
            "layer": layer,
            "shares": [round(share, 4) for share in (moe.load / moe.load.sum()).tolist()],
            "top_over_mean": round(float(moe.load.max() / moe.load.mean()), 3),
            "bias_std": round(float(moe.expert_bias.std(correction=0)), 4),
        }
        for layer, moe in network.routers().items()
    ]
