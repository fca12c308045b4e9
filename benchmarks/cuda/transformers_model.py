"""The full-size model of transformers, with the weights that `full_size.build` gives ours."""

from __future__ import annotations

import torch
from full_size import RandomTensors
from transformers import Lfm2MoeConfig, Lfm2MoeForCausalLM

from lfm2kit.checkpoint.config import LFM2_8B_A1B as C


def transformers_model(tensors: RandomTensors) -> Lfm2MoeForCausalLM:
    names = (
        "vocab_size hidden_size intermediate_size moe_intermediate_size num_attention_heads "
        "num_key_value_heads num_dense_layers num_experts num_experts_per_tok norm_topk_prob "
        "use_expert_bias routed_scaling_factor conv_L_cache conv_bias norm_eps"
    )
    config = Lfm2MoeConfig(
        **{name: getattr(C, name) for name in names.split()},
        num_hidden_layers=C.num_hidden_layers,
        tie_word_embeddings=True,
        layer_types=list(C.layer_types),
        rope_parameters={"rope_type": "default", "rope_theta": C.rope_theta},
    )
    with torch.device("cuda"):
        model = Lfm2MoeForCausalLM(config)
    for name, weight in model.state_dict().items():
        weight.copy_(_value(tensors, name.removeprefix("model.")))
    return model.eval()


def _value(tensors: RandomTensors, name: str) -> torch.Tensor:
    scope, _, last = name.rpartition(".")
    experts = [f"{scope}.{e}" for e in range(C.num_experts)]
    if last == "gate_up_proj":
        return torch.stack([torch.cat([_value(tensors, f"{e}.{w}.weight") for w in ("w1", "w3")])
                            for e in experts])  # fmt: skip
    if last == "down_proj":
        return torch.stack([_value(tensors, f"{e}.w2.weight") for e in experts])
    return torch.tensor(tensors["embed_tokens.weight" if scope == "lm_head" else name].float32())
