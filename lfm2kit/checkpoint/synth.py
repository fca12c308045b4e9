"""Random checkpoints of any size, for benchmarks and tests: made piece by piece."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lfm2kit.checkpoint.config import ATTENTION, CONV, LFM2_8B_A1B, model_spec, parse_config
from lfm2kit.checkpoint.convert import Source, config_fields
from lfm2kit.checkpoint.random_weights import random_values
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
    """Return a source of random weights for the model that a config.json's keys describe."""
    parsed = parse_config(config)
    spec = model_spec(parsed, tied=parsed.tie_word_embeddings is not False)
    shapes = spec.parameters()

    def values(name: str, begin: int, end: int) -> Tensor:
        return Tensor.of_array(name, random_values(name, shapes[name], seed, begin, end))

    return Source(config, shapes, dict.fromkeys(shapes, F32), values)
