"""Recognises quantised checkpoints, which lfm2kit does not run, by their config or tensor names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from reprlib import repr as brief  # of what a file says, however long it is
from typing import Any

GIVE = (
    "lfm2kit itself reads F32, F16 and BF16; give the model that it was made from, or install a "
    "plugin that reads it"
)

# Keys of a config.json: transformers', compressed-tensors' older one, MLX's.
KEYS = ("quantization_config", "compression_config", "quantization")

# Endings of tensor names that only a quantised format has.
ENDINGS: Mapping[str, str] = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".g_idx": "GPTQ",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".quant_state": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "compressed-tensors or FP8",
    ".weight_scale_inv": "FP8",
    ".weight_zero_point": "compressed-tensors",
    ".input_scale": "FP8",
    "_proj_blocks": "MXFP4",
    "_proj_scales": "MXFP4",
    ".scales": "MLX, GPTQ or AWQ",
    ".biases": "MLX",
    ".hqq_meta": "HQQ",
}

# bitsandbytes may add to its ending: `.absmax`, but also `.quant_state.bitsandbytes__nf4`.
ANY_ENDING = re.compile(f"({'|'.join(map(re.escape, ENDINGS))})(?:$|[.])")


def said_by_config(fields: Mapping[str, Any]) -> str | None:
    """Return a sentence about a config.json that says the weights are quantised; else None."""
    for key in KEYS:
        said = fields.get(key)
        if said is None or said == {}:
            continue
        method = _method(said) if isinstance(said, dict) else said
        return f"{key} says that the weights are quantised ({brief(method)[:60]}); {GIVE}"
    return None


def said_by_names(names: Iterable[str]) -> str | None:
    """Return a sentence about tensor names that only quantised weights have; else None."""
    for name in names:
        if (found := ANY_ENDING.search(name)) is not None:
            return f"tensor '{name}' belongs to quantised weights ({ENDINGS[found[1]]}); {GIVE}"
    return None


def _method(said: Mapping[str, Any]) -> Any:
    """Return the quantisation method that a config section names; each tool has its own key."""
    if said.get("quant_method") is not None:
        return said["quant_method"]
    flags = [key for key in ("load_in_4bit", "load_in_8bit") if said.get(key) is True]
    return "bitsandbytes" if flags else said.get("format", said.get("bits", "of an unnamed method"))
