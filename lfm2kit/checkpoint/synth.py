"""Random checkpoints of any size, for benchmarks and tests: made tensor by tensor."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from lfm2kit.checkpoint.convert import Source, config_fields
from lfm2kit.config import ATTENTION, CONV, LFM2_8B_A1B, model_spec, parse_config
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
    bias of 0, as models are initialised, half of all routing bugs change nothing.  A tensor's
    values depend on its name and the seed alone.
    """
    parsed = parse_config(config)
    spec = model_spec(parsed, tied=parsed.tie_word_embeddings is not False)
    shapes = spec.parameters()

    def tensor(name: str) -> Tensor:
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        values = rng.standard_normal(shapes[name], dtype=np.float32)
        return Tensor(name, "F32", _scaled(name, values))

    return Source(config, shapes, dict.fromkeys(shapes, "F32"), tensor)


def _scaled(name: str, values: Any) -> Any:
    if "norm" in name:
        return 1 + np.float32(0.1) * values
    if name.endswith("bias"):
        return np.float32(0.1) * values
    if name.endswith(("embed_tokens.weight", "lm_head.weight")):  # logits of std 3
        return values * np.float32(3 / math.sqrt(values.shape[1]))
    return values / np.float32(math.sqrt(math.prod(values.shape[1:])))
