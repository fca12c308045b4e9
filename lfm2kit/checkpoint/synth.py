"""Random checkpoints of any size, for benchmarks and tests: made piece by piece."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lfm2kit.checkpoint.convert import Source, config_fields
from lfm2kit.checkpoint.pieces import PIECE
from lfm2kit.config import ATTENTION, CONV, LFM2_8B_A1B, model_spec, parse_config
from lfm2kit.formats import F32
from lfm2kit.weights import Tensor

# LFM2-8B-A1B's widths in six layers: what a small machine can measure on.
WIDE_6: Mapping[str, Any] = config_fields(LFM2_8B_A1B) | {
    "layer_types": [CONV, CONV, ATTENTION, CONV, CONV, ATTENTION],
    "num_hidden_layers": 6,
    "tie_word_embeddings": True,
}
LFM2_8B: Mapping[str, Any] = config_fields(LFM2_8B_A1B) | {"tie_word_embeddings": True}
KNOWN: Mapping[str, Mapping[str, Any]] = {"wide-6": WIDE_6, "lfm2-8b-a1b": LFM2_8B}


def random_source(config: Mapping[str, Any], seed: int = 0) -> Source:
    """Weights that keep activations of order 1 and tell implementations apart.

    Matrices have std 1 / sqrt(inputs), norms are 1 +- 0.1, the router's bias has std 0.1: with a
    bias of 0, as models are initialised, half of all routing bugs change nothing.  A value depends
    on the tensor's name, its place there and the seed alone.
    """
    parsed = parse_config(config)
    spec = model_spec(parsed, tied=parsed.tie_word_embeddings is not False)
    shapes = spec.parameters()

    def values(name: str, begin: int, end: int) -> Tensor:
        normal = _normal(seed, name, begin, end)
        return Tensor.of_array(name, _scaled(name, shapes[name], normal))

    return Source(config, shapes, dict.fromkeys(shapes, F32), values)


def _normal(seed: int, name: str, begin: int, end: int) -> Any:
    """Elements `begin` to `end` of a tensor of normal values.

    Every `PIECE` of them has a generator of its own, so that threads can make them in any order.
    """
    first = begin // PIECE
    key = zlib.crc32(name.encode())
    pieces = [
        np.random.default_rng([seed, key, i]).standard_normal(
            min(PIECE, end - i * PIECE), dtype=np.float32
        )
        for i in range(first, -(-end // PIECE))
    ]
    whole = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    return whole[begin - first * PIECE :]


def _scaled(name: str, shape: Sequence[int], values: Any) -> Any:
    if "norm" in name:
        return 1 + np.float32(0.1) * values
    if name.endswith("bias"):
        return np.float32(0.1) * values
    if name.endswith(("embed_tokens.weight", "lm_head.weight")):  # logits of std 3
        return values * np.float32(3 / math.sqrt(shape[1]))
    return values / np.float32(math.sqrt(math.prod(shape[1:])))
