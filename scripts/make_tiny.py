"""Makes the embedded model lfm2kit/models/tiny: random weights, 128 inputs, their answers.

    python -m venv oracle && oracle/bin/pip install torch transformers numpy
    PYTHONPATH=. oracle/bin/python scripts/make_tiny.py

The answers are transformers' logits in float64 (see `oracle.py`), stored as float32.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from lfm2kit.checkpoint.convert import write_checkpoint
from lfm2kit.checkpoint.synth import random_source
from lfm2kit.formats import BF16
from lfm2kit.measuring import samples

sys.path.insert(0, str(Path(__file__).parent))
from oracle import Oracle

TARGET = Path(__file__).parents[1] / "lfm2kit" / "models" / "tiny"
SEED = 3
SAMPLES, SEQ_LEN = 128, 16
CANDIDATES = 160
LEAST_MARGIN = 5e-3  # of the top-1 logit, and
LEAST_GAP = 1e-5  # of the last expert taken: near ties say nothing about an implementation
LAYERS = ["conv", "conv", "full_attention", "conv", "conv", "full_attention", "conv", "conv"]
CONFIG: dict[str, Any] = {
    "architectures": ["Lfm2MoeForCausalLM"],
    "model_type": "lfm2_moe",
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 320,
    "moe_intermediate_size": 48,
    "num_hidden_layers": len(LAYERS),
    "layer_types": LAYERS,
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


def main() -> None:
    write_checkpoint(random_source(CONFIG, SEED), TARGET, BF16, overwrite=True)
    rng = np.random.default_rng(SEED)
    token_ids = rng.integers(0, CONFIG["vocab_size"], (CANDIDATES, SEQ_LEN), dtype=np.int32)
    oracle = Oracle(TARGET)
    chosen, answers = [], []
    for ids in token_ids:
        logits = oracle.logits(ids)[-1]
        second, first = np.sort(logits)[-2:]
        if first - second > LEAST_MARGIN and oracle.least_gap > LEAST_GAP:
            chosen.append(ids)
            answers.append(logits)
    print(f"{len(chosen)} of {CANDIDATES} candidates; logits std {np.std(answers):.3g}")
    print(f"rows per expert: {oracle.loads()}")
    samples.write_inputs(TARGET / "inputs.bin", np.array(chosen[:SAMPLES]))
    samples.write_outputs(TARGET / "answers.bin", np.array(answers[:SAMPLES], dtype=np.float32))


if __name__ == "__main__":
    main()
