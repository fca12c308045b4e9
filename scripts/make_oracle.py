"""Makes tests/oracle: small checkpoints, each named after what it guards, and their answers.

    PYTHONPATH=. oracle/bin/python scripts/make_oracle.py [CASE ...]        (see make_chats.py)

A case is a Hugging Face folder with `expected.npz`: sequences `ids_0`, ..., the positions
`rows_0` whose logits are kept, `logits_0`, and what each MoE layer's router chose for every
position, `experts_0` and `weights_0` [moe layers, tokens, k].  All in float64, kept as float32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lfm2kit.checkpoint.config import ATTENTION, CONV
from lfm2kit.checkpoint.convert import Source, write_checkpoint
from lfm2kit.checkpoint.names import SINGLE
from lfm2kit.checkpoint.safetensors import read_safetensors, write_safetensors
from lfm2kit.checkpoint.synth import random_source
from lfm2kit.formats import BF16, F16, F32, Format
from lfm2kit.weights import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from oracle import Oracle

TARGET = Path(__file__).parents[1] / "tests" / "oracle"
BASE: dict[str, Any] = {
    "architectures": ["Lfm2MoeForCausalLM"],
    "model_type": "lfm2_moe",
    "vocab_size": 80,
    "hidden_size": 24,
    "intermediate_size": 40,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 4,
    "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_dense_layers": 1,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "use_expert_bias": True,
    "routed_scaling_factor": 1.0,
    "conv_L_cache": 3,
    "conv_bias": False,
    "norm_eps": 1e-5,
    "rope_theta": 50000.0,
    "max_position_embeddings": 128000,
    "tie_word_embeddings": True,
}
MOE_ONLY = ("moe_intermediate_size", "num_dense_layers", "norm_topk_prob", "routed_scaling_factor")
# The keys of the first LFM2, which say some things twice: no layer has experts.
DENSE: dict[str, Any] = {
    **{key: None for key in BASE if "expert" in key or key in MOE_ONLY},
    "architectures": ["Lfm2ForCausalLM"],
    "model_type": "lfm2",
    "layer_types": None,
    "full_attn_idxs": [1, 3],
    "intermediate_size": None,
    "block_ff_dim": 61,
    "block_auto_adjust_ff_dim": True,  # to 40: two thirds, times the multiplier, rounded up
    "block_ffn_dim_multiplier": 1.0,
    "block_multiple_of": 8,
    "block_dim": 24,
    "block_norm_eps": 1e-5,
    "block_use_swiglu": True,
    "conv_dim": 24,
    "conv_dim_out": 24,
    "num_heads": 4,
    "theta": 50000.0,
    "use_pos_enc": True,
}
DENSE_LATER = {**DENSE, "block_ff_dim": None, "intermediate_size": 61, "full_attn_idxs": None}
ONE_LAYER = {"num_hidden_layers": 1, "num_dense_layers": 0, "layer_types": ["conv"]}
NESTED = {"rope_parameters": {"rope_theta": 5e6, "rope_type": "default"}, "rope_theta": None}
NARROW = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "moe_intermediate_size": 4,
    "num_experts_per_tok": 4,
    "num_dense_layers": 2,
}
LONG = (1100,)
LEAST_GAP = 2e-6  # between the last expert taken and the first not: below it, a near tie

Change = Callable[[str, Any], Any]  # (canonical name, values) -> values


@dataclass(frozen=True)
class Case:
    config: Mapping[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = (9, 4)
    change: Change = lambda name, values: values
    format: Format = F32
    max_shard: int = 10**9


def scaled(ending: str, factor: float) -> Change:
    return lambda name, values: values * np.float32(factor) if name.endswith(ending) else values


def bias_beyond_bf16(name: str, values: Any) -> Any:
    """Return scores near 0.5 and biases whose differences bfloat16 would round away."""
    if name.endswith("expert_bias"):
        return np.float32(1) + np.float32(0.01) * values
    return np.float32(0.002) * values if name.endswith("gate.weight") else values


def layers(count: int, *attention: int) -> list[str]:
    return [ATTENTION if i in attention else CONV for i in range(count)]


CASES = {
    "router_bias_and_normalisation": Case(),
    "router_without_bias": Case({"use_expert_bias": False}),
    "router_without_normalisation": Case({"norm_topk_prob": False}),
    "router_scaled": Case({"routed_scaling_factor": 2.5}),
    "router_scaled_bare": Case(
        {"routed_scaling_factor": 2.5, "norm_topk_prob": False, "use_expert_bias": False}
    ),
    "router_extreme_logits": Case(change=scaled("gate.weight", 60)),
    "router_bias_stays_float32": Case(change=bias_beyond_bf16, format=BF16),
    "router_ids_at_any_batch_size": Case(lengths=(140,)),
    "experts_5_top_1": Case({"num_experts": 5, "num_experts_per_tok": 1}),
    "experts_12_top_3": Case({"num_experts": 12}),
    "experts_33_top_8": Case(
        {"num_experts": 33, "num_experts_per_tok": 8, "moe_intermediate_size": 6}
    ),
    "sequences_of_many_lengths": Case(lengths=(5, 1, 16, 2, 33, 3, 8)),
    "padded_equals_unpadded": Case(lengths=(6, 3)),
    "rope_theta_flat_1e6": Case({"rope_theta": 1e6}, lengths=LONG),
    "rope_theta_nested_5e6": Case(NESTED, lengths=LONG),
    "w1_is_the_gate": Case(change=scaled("w1.weight", 4)),
    "experts_stored_apart": Case(),
    "experts_stored_packed": Case(),
    "odd_conv_bias_kernel_4": Case({"conv_bias": True, "conv_L_cache": 4}),
    "odd_kernel_1": Case({"conv_L_cache": 1}),
    "odd_untied_attention_first": Case(
        {
            "tie_word_embeddings": False,
            "layer_types": ["full_attention", "conv", "conv", "full_attention"],
        }
    ),
    "odd_one_layer_no_dense": Case(ONE_LAYER, lengths=(1, 7)),
    "odd_all_dense": Case({"num_dense_layers": 4}),
    "odd_no_bias_scaled_top_3_of_12": Case(
        {
            "num_experts": 12,
            "use_expert_bias": False,
            "norm_topk_prob": False,
            "routed_scaling_factor": 2.5,
            "num_dense_layers": 0,
        }
    ),
    "odd_one_kv_head": Case({"num_key_value_heads": 1}),
    "odd_one_token": Case(lengths=(1, 1, 1)),
    "odd_stored_as_f16": Case(format=F16),
    "odd_sharded": Case(max_shard=20_000),
    "dense_lfm2_older_keys": Case(DENSE),
    "dense_lfm2_multiplied": Case(
        {**DENSE_LATER, "layer_types": layers(4, 0, 2), "block_ffn_dim_multiplier": 1.3}
    ),
    "dense_lfm2_not_adjusted": Case(
        {
            **DENSE_LATER,
            **NESTED,
            "theta": None,
            "layer_types": layers(4, 1, 3),
            "block_auto_adjust_ff_dim": False,
        }
    ),
    "like_lfm2_5_8b_a1b_packed": Case(
        {
            **NARROW,
            **NESTED,
            "num_experts": 32,
            "num_hidden_layers": 24,
            "layer_types": layers(24, 2, 6, 10, 14, 18, 21),
        },
        format=BF16,
    ),
    "like_lfm2_24b_a2b_packed": Case(
        {
            **NARROW,
            "num_experts": 64,
            "num_hidden_layers": 12,  # of 40
            "layer_types": layers(12, 2, 6, 10),
        },
        format=BF16,
    ),
}


def main(asked: Sequence[str]) -> None:
    TARGET.mkdir(exist_ok=True)
    for name, case in ((name, CASES[name]) for name in asked or CASES):
        folder = TARGET / name
        (folder / "expected.npz").unlink(missing_ok=True)
        write(folder, case)
        if name.endswith("packed"):
            pack(folder)
        expected, gap = answers(folder, case)
        np.savez_compressed(folder / "expected.npz", **expected)
        print(f"{name}: least routing gap {gap:.3g}")


def write(folder: Path, case: Case) -> None:
    config = {k: v for k, v in {**BASE, **case.config}.items() if v is not None}
    source = random_source(config, seed=1)
    write_checkpoint(
        changed(source, case.change), folder, case.format, overwrite=True, max_shard=case.max_shard
    )


def changed(source: Source, change: Change) -> Source:
    def values(name: str, begin: int, end: int) -> Tensor:
        whole = change(name, source.tensor(name).float32()).astype(np.float32)
        return Tensor.of_array(name, whole.reshape(-1)[begin:end])

    return replace(source, values=values)


def answers(folder: Path, case: Case) -> tuple[dict[str, Any], float]:
    """Return the arrays of expected.npz, from ids that route without near ties."""
    oracle = Oracle(folder)
    vocab_size = oracle.model.config.vocab_size
    rng = np.random.default_rng(7)
    expected: dict[str, Any] = {}
    least = float("inf")
    for i, length in enumerate(case.lengths):
        while True:
            ids = rng.integers(0, vocab_size, length, dtype=np.int32)
            logits = oracle.logits(ids)
            if oracle.least_gap > LEAST_GAP:
                break
        routing = oracle.routings[-1]
        least = min(least, oracle.least_gap)
        if "padded" in folder.name:
            check_padding(oracle, ids, logits)
        rows = np.arange(length) if length < 100 else np.r_[0:3, 63:66, length - 3 : length]
        expected |= {
            f"ids_{i}": ids,
            f"rows_{i}": rows,
            f"logits_{i}": logits[rows].astype(np.float32),
            f"experts_{i}": np.array([e for e, _ in routing], dtype=np.int16),
            f"weights_{i}": np.array([w for _, w in routing], dtype=np.float32),
        }
    return expected, least


def check_padding(oracle: Oracle, ids: Any, logits: Any) -> None:
    """Check that transformers itself has the unpadded logits when it is told of the padding."""
    for pad in range(1, 9):
        mask = torch.tensor([[0] * pad + [1] * len(ids)])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        padded = oracle.logits(
            np.concatenate([np.zeros(pad, np.int32), ids]),
            attention_mask=mask,
            position_ids=positions,
        )
        np.testing.assert_allclose(padded[pad:], logits, atol=1e-9)


def pack(folder: Path) -> None:
    """Store each layer's experts as transformers 5 holds them: gate_up_proj and down_proj."""
    stored = read_safetensors(folder / SINGLE)
    packed = {name: (t.format, t.data) for name, t in stored.items() if ".experts." not in name}
    for prefix in sorted({n.split(".experts.")[0] for n in stored if ".experts." in n}):

        def expert(e: int, w: str, prefix: str = prefix) -> Tensor:
            return stored[f"{prefix}.experts.{e}.{w}.weight"]

        count = sum(n.startswith(f"{prefix}.experts.") for n in stored) // 3
        gate_up = [np.concatenate([expert(e, w).data for w in ("w1", "w3")]) for e in range(count)]
        down = [expert(e, "w2").data for e in range(count)]
        format = expert(0, "w1").format
        packed[f"{prefix}.experts.gate_up_proj"] = format, np.stack(gate_up)
        packed[f"{prefix}.experts.down_proj"] = format, np.stack(down)
    partial = folder / "packed"
    with open(partial, "wb") as file:
        entries = [(name, format, data.shape) for name, (format, data) in packed.items()]
        write_safetensors(file, entries, lambda name: [packed[name][1]])
    partial.replace(folder / SINGLE)


if __name__ == "__main__":
    main(sys.argv[1:])
