"""A checkpoint of 2.6 M random weights, for tests that need neither text nor files.

They tell routers apart better than the embedded model, which is trained: its experts are alike, and
the biases of its routers have a std of 0.01.  Those here have one of 0.1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lfm2kit.building.loading import set_up
from lfm2kit.building.options import Options
from lfm2kit.checkpoint import Checkpoint
from lfm2kit.checkpoint.config import model_spec, parse_config
from lfm2kit.checkpoint.convert import write_checkpoint
from lfm2kit.checkpoint.synth import random_source
from lfm2kit.formats import BF16
from lfm2kit.model import LFM2
from lfm2kit.testing.random_weights import stored_as
from lfm2kit.weights import Weights

CONFIG: dict[str, Any] = {
    "architectures": ["Lfm2MoeForCausalLM"],
    "model_type": "lfm2_moe",
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 320,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 8,
    "layer_types": [
        "conv",
        "conv",
        "full_attention",
        "conv",
        "conv",
        "full_attention",
        "conv",
        "conv",
    ],
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_dense_layers": 2,
    "num_experts": 16,
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


SOURCE = random_source(CONFIG, seed=3)


def _checkpoint() -> Checkpoint:
    weights = Weights({name: SOURCE.tensor(name) for name in SOURCE.shapes})
    parsed = parse_config(CONFIG)
    spec = model_spec(parsed, tied=True)
    return Checkpoint(Path("random"), spec, stored_as(weights, BF16), parsed)


RANDOM = _checkpoint()


def write_random_model(folder: Path) -> Path:
    """Write the same checkpoint into a new folder, and return it."""
    write_checkpoint(SOURCE, folder, BF16)
    return folder


def build_random(backend: str, **options: Any) -> LFM2:
    """Build the model as `load_model` does."""
    return set_up(RANDOM, Options(backend=backend, **options)).build()
