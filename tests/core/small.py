"""A small model with every kind of block, random weights, and what tests need to build it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lfm2kit import specs
from lfm2kit.backend import Backend
from lfm2kit.building.builder import Builder, build_model
from lfm2kit.building.placement import Placer
from lfm2kit.building.plan import Plan
from lfm2kit.checkpoint.config import ModelConfig, model_spec, parse_config
from lfm2kit.model import JOINS, LFM2
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.rewrites import Rewrite, rewritten
from lfm2kit.weights import Weights

FIELDS = {
    "model_type": "lfm2_moe",
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "moe_intermediate_size": 12,
    "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_dense_layers": 2,
    "num_experts": 5,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "use_expert_bias": True,
    "routed_scaling_factor": 1.5,
    "conv_L_cache": 3,
    "conv_bias": False,
    "norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "tie_word_embeddings": True,
}


def config(**changes: object) -> ModelConfig:
    return parse_config({**FIELDS, **changes})


def small_spec(**changes: object) -> specs.Model:
    return model_spec(config(**changes), tied=True)


def random_weights(spec: specs.Spec, seed: int = 0) -> Weights:
    rng = np.random.default_rng(seed)
    return Weights.of_arrays(
        {
            name: rng.normal(1.0 if "norm" in name else 0.0, 0.2, shape)
            for name, shape in spec.parameters().items()
        }
    )


def build(
    spec: specs.Model,
    plan: str = "reference",
    backends: Mapping[str, Backend] | None = None,
    *,
    rewrites: Sequence[Rewrite] = (),
    weights: Weights | None = None,
    **builder: object,
) -> LFM2:
    """Return the model that `plan` makes of `spec` after `rewrites`, of random weights or these."""
    create, weights = creator(backends or {}), weights or random_weights(spec)
    spec, joins = rewritten(spec, JOINS, rewrites)
    placed = Placer(Plan.parse(plan), create, joins, ["reference", *(backends or {})]).place(spec)
    return build_model(placed, Builder(weights, create, **builder), Plan.parse(plan).default)  # type: ignore[arg-type]


def creator(backends: Mapping[str, Backend]) -> Callable[[str], Backend]:
    everyone: dict[str, Backend] = {"reference": ReferenceBackend(), **backends}
    return everyone.__getitem__
