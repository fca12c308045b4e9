"""Bounds every size that a file or a user can set, in the same way for every format.

No model of this family comes near these bounds.  Larger numbers would cost memory or time before
the mistake shows.  config.json, model.toml, model.bin, safetensors headers, plans and the command
line all use them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from reprlib import repr as brief  # of what a file says, however long it is
from typing import Any

from lfm2kit import specs
from lfm2kit.errors import Lfm2kitError

LAYERS = 1024
EXPERTS = 1024
TENSORS = 200_000  # of a model, or of a file
DIMENSIONS = 8  # of a tensor
DIMENSION = 2**31 - 1
NAME = 1000  # bytes of a tensor's name
HEADER = 100_000_000  # bytes of a safetensors header: the library's own limit
JSON = 2**25  # bytes of a config.json or an index: enough for an index of TENSORS names
NESTED = 127  # levels of JSON and TOML: the safetensors library's limit
TOML = 2**18  # bytes of a model.toml or a plan: people write them by hand
PARTS = 16  # of a key in TOML
RULES = 4096  # of a plan
TOKENIZER = 2**28  # bytes of a tokenizer.json: the largest known ones have 34 MB
TEMPLATE = 2**20  # bytes of a chat template
TEXT = 2**26  # characters that are tokenized at once
PROMPTS = 2**28  # bytes of a file of prompts
ANSWER = 2**28  # bytes of a line of answers, of which there may be any number
DIGITS = 4000  # of a whole number in JSON
CONSTRAINT = 2**16  # characters of a JSON schema, a regex or a grammar
TOOL_CALL = 2**16  # bytes of a model's tool calls, as it writes them
COUNT = 2**20  # any count on the command line: samples, tokens of a sample, threads, ...
TOKENS = 2**26  # of all samples together
SEED = 2**63 - 1

WIDTH, HEADS, KERNEL = 2**20, 2**14, 2**10

# The largest values of whole numbers, by their names in config.json and the specs.
LARGEST: Mapping[str, int] = {
    "vocab_size": 2**24,
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "moe_intermediate_size": WIDTH,
    "block_multiple_of": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_dense_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "head_dim": HEADS,
    "num_experts": EXPERTS,
    "num_experts_per_tok": EXPERTS,
    "conv_L_cache": KERNEL,
    "kernel_size": KERNEL,
    "repeat": LAYERS,
    "max_position_embeddings": DIMENSION,
}

# The least and largest values of real numbers.
REAL: Mapping[str, tuple[float, float]] = {
    "eps": (1e-20, 1.0),
    "norm_eps": (1e-20, 1.0),
    "rope_theta": (1.0, 1e12),
    "routed_scaling_factor": (1e-6, 1e6),
    "block_ffn_dim_multiplier": (1e-3, 1e3),
}


def whole(where: str, key: str, value: Any, least: int = 1) -> int:
    """Return `value` if it is a whole number from `least` to `LARGEST[key]`.

    Raise `Lfm2kitError` otherwise; `where` names the number in the message.
    """
    most = LARGEST[key]
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise Lfm2kitError(
            f"{where} is {brief(value)}; expected a whole number from {least} to {most}"
        )
    return value


def real(where: str, key: str, value: Any) -> float:
    """Return `value` as a float if it lies within `REAL[key]`; raise `Lfm2kitError` otherwise."""
    least, most = REAL[key]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not least <= value <= most:  # false for NaN as well
        raise Lfm2kitError(
            f"{where} is {brief(value)}; expected a number from {least:g} to {most:g}"
        )
    return float(value)


def check_tokens(samples: int, seq_len: int) -> None:
    """Raise `Lfm2kitError` if all samples together have too many tokens."""
    if samples * seq_len > TOKENS:
        raise Lfm2kitError(
            f"{samples} samples of {seq_len} tokens; lfm2kit takes up to {TOKENS} tokens at once"
        )


def check_tensors(model: specs.Model) -> None:
    """Raise `Lfm2kitError` if the model has too many tensors.

    Counts without listing names: the names of a billion experts would fill the memory.
    """
    total = sum(count * _tensors(layer) for layer, count in Counter(model.layers).items())
    if total > TENSORS:
        raise Lfm2kitError(f"the layers have {total} tensors; lfm2kit takes up to {TENSORS}")


def _tensors(spec: specs.Spec) -> int:
    if isinstance(spec, specs.Experts):
        return len(spec.local_experts) * len(spec.expert.parameters())
    parts = spec.parts()
    return sum(_tensors(part.spec) for part in parts) if parts else len(spec.parameters())
