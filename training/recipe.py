"""The model that is trained, as the keys of its config.json, and how it is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from lfm2kit.errors import Lfm2kitError

LAYERS = ["conv", "conv", "full_attention", "conv", "conv", "full_attention"]
# 4.93 M parameters, 9.87 MB. Every width is a multiple of 32, for formats that store blocks.
CONFIG: dict[str, Any] = {
    "architectures": ["Lfm2MoeForCausalLM"],
    "model_type": "lfm2_moe",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 384,
    "moe_intermediate_size": 64,
    "num_hidden_layers": len(LAYERS),
    "layer_types": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_dense_layers": 2,
    "num_experts": 12,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "use_expert_bias": True,
    "routed_scaling_factor": 1.0,
    "conv_L_cache": 3,
    "conv_bias": False,
    "norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 128000,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 7,
    "pad_token_id": 0,
    "dtype": "bfloat16",
}


SHARES = ("warmup", "frozen_bias")
MOST_SEED = 2**63 - 1  # that torch takes


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the model is trained; the learning rates are those at the peak."""

    tokens: int = 1_700_000  # in all
    sequences: int = 4  # of a step
    length: int = 256  # of a sequence, in tokens
    dropout: float = 0.0  # of what each block adds to the residual stream
    muon_rate: float = 0.02  # for matrices
    adam_rate: float = 3e-3  # for embedding, norms, convolutions and routers
    weight_decay: float = 0.0
    bias_rate: float = 2e-3  # of the routers' biases
    warmup: float = 0.02  # of all steps
    frozen_bias: float = 0.05  # of all steps, at the end
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise `Lfm2kitError` for values with which nothing can be trained."""
        for field in fields(self):
            value, option = getattr(self, field.name), f"--{field.name.replace('_', '-')}"
            if not 0 <= value < math.inf:
                raise Lfm2kitError(f"{option} {value}: give a number of 0 or more")
            if field.name in SHARES and value > 1:
                raise Lfm2kitError(f"{option} {value}: give a share of all steps, from 0 to 1")
        if self.seed > MOST_SEED:
            raise Lfm2kitError(f"--seed {self.seed}: give a number up to {MOST_SEED}")
        if min(self.sequences, self.length) < 1:
            raise Lfm2kitError(
                f"{self.sequences} sequences of {self.length} tokens: give 1 or more of both"
            )
        if not 0 <= self.dropout < 1:
            raise Lfm2kitError(f"a dropout of {self.dropout}: give 0 or more, and less than 1")

    @property
    def steps(self) -> int:
        """Return the number of steps: whole ones, at least 1."""
        return max(1, self.tokens // (self.sequences * self.length))

    def rate_at(self, step: int) -> float:
        """Return the factor of the learning rates: up in the warm-up, then down to 0 linearly."""
        warmup = max(1, round(self.warmup * self.steps))
        if step < warmup:
            return (step + 1) / warmup
        return (self.steps - step) / max(1, self.steps - warmup)

    def bias_rate_at(self, step: int) -> float:
        """Return by how much a step moves the routers' biases; at the end they stay."""
        is_frozen = step >= (1 - self.frozen_bias) * self.steps
        return 0.0 if is_frozen else self.bias_rate * self.rate_at(step)
