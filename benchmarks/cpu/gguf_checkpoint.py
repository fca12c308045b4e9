"""Writes a checkpoint as GGUF, for llama.cpp: the same weights in the same types, no vocabulary.

    python gguf_checkpoint.py wide-6-F32 wide-6-F32.gguf

Names and keys are those of llama.cpp's architecture `lfm2moe`.  One tensor is in memory at a time;
the experts of a layer are one tensor there.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from lfm2kit.checkpoint import Checkpoint, mapped, open_checkpoint
from lfm2kit.checkpoint.config import ModelConfig
from lfm2kit.errors import Lfm2kitError
from lfm2kit.formats import BF16, F16, F32, Format
from lfm2kit.weights import Tensor

CONTEXT_LENGTH = 128000
NAMES = {
    "embed_tokens.weight": "token_embd.weight",
    "embedding_norm.weight": "token_embd_norm.weight",
    "lm_head.weight": "output.weight",
}
NAMES_IN_LAYERS = {
    "operator_norm.weight": "attn_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "conv.in_proj.weight": "shortconv.in_proj.weight",
    "conv.conv.weight": "shortconv.conv.weight",
    "conv.out_proj.weight": "shortconv.out_proj.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.out_proj.weight": "attn_output.weight",
    "self_attn.q_layernorm.weight": "attn_q_norm.weight",
    "self_attn.k_layernorm.weight": "attn_k_norm.weight",
    "feed_forward.w1.weight": "ffn_gate.weight",
    "feed_forward.w2.weight": "ffn_down.weight",
    "feed_forward.w3.weight": "ffn_up.weight",
    "feed_forward.gate.weight": "ffn_gate_inp.weight",
    "feed_forward.expert_bias": "exp_probs_b.bias",
    "feed_forward.experts.w1.weight": "ffn_gate_exps.weight",
    "feed_forward.experts.w2.weight": "ffn_down_exps.weight",
    "feed_forward.experts.w3.weight": "ffn_up_exps.weight",
}
# llama.cpp wants these in float32, and every vector.
ALWAYS_F32 = ("shortconv.conv.weight", "ffn_gate_inp.weight", "_norm.weight")
QUANTIZATION: dict[Format, gguf.GGMLQuantizationType] = {
    F32: gguf.GGMLQuantizationType.F32,
    F16: gguf.GGMLQuantizationType.F16,
    BF16: gguf.GGMLQuantizationType.BF16,
}


@dataclass(frozen=True)
class Entry:
    """One tensor of the GGUF file: the checkpoint's tensors that it stacks, usually one."""

    name: str
    parts: list[Tensor]

    @property
    def shape(self) -> tuple[int, ...]:
        first = tuple(n for n in self.parts[0].shape if n != 1)  # a ShortConv's filter is 2-d there
        return (len(self.parts), *first) if len(self.parts) > 1 else first

    @property
    def format(self) -> Format:
        is_small = len(self.shape) < 2 or self.name.endswith(ALWAYS_F32)
        return F32 if is_small else self.parts[0].format

    def array(self) -> npt.NDArray[Any]:
        """Return the values as the file holds them, and give back the memory that reading took."""
        stacked = np.stack([part.stored_as(self.format).data for part in self.parts])
        for part in self.parts:
            mapped.release(part.data)
        return stacked.reshape(self.shape)


def write_gguf(folder: Path, target: Path) -> None:
    checkpoint = open_checkpoint(folder)
    unfinished = target.with_name(target.name + ".unfinished")
    writer = gguf.GGUFWriter(unfinished, "lfm2moe")
    _add_keys(writer, _representable(checkpoint))
    entries = list(_entries(checkpoint))
    for entry in entries:
        stored, nbytes = entry.format.block, entry.format.nbytes(entry.shape)
        writer.add_tensor_info(entry.name, entry.shape, stored, nbytes, QUANTIZATION[entry.format])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in entries:
        writer.write_tensor_data(entry.array())
    writer.close()
    unfinished.rename(target)


def _representable(checkpoint: Checkpoint) -> ModelConfig:
    """Return the configuration; refuse one of which llama.cpp would compute another model."""
    config = checkpoint.config
    if config is None:
        raise Lfm2kitError(f"{checkpoint.path}: GGUF needs a config.json")
    if not (config.norm_topk_prob and config.use_expert_bias and not config.conv_bias):
        raise Lfm2kitError(f"{checkpoint.path}: llama.cpp's lfm2moe has no such router or bias")
    if config.routed_scaling_factor != 1:
        raise Lfm2kitError(f"{checkpoint.path}: llama.cpp's lfm2moe does not scale its experts")
    return config


def _add_keys(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    kinds = config.layer_types
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(CONTEXT_LENGTH)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    # No heads of keys: that is how llama.cpp tells a ShortConv layer.
    writer.add_head_count_kv([config.num_key_value_heads * (k != "conv") for k in kinds])
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_leading_dense_block_count(config.num_dense_layers)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_shortconv_l_cache(config.conv_L_cache)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")


def _entries(checkpoint: Checkpoint) -> Iterator[Entry]:
    """Yield tensors in the checkpoint's order, the experts of a layer together by their number."""
    groups: dict[str, list[Tensor]] = {}
    for name in checkpoint.spec.parameters():
        merged = re.sub(r"\.experts\.\d+\.", ".experts.", name)
        groups.setdefault(merged, []).append(checkpoint.weights[name])
    for name, parts in groups.items():
        yield Entry(_gguf_name(name), parts)


def _gguf_name(name: str) -> str:
    in_layer = re.fullmatch(r"layers\.(\d+)\.(.*)", name)
    if in_layer is None:
        return NAMES[name]
    return f"blk.{in_layer[1]}.{NAMES_IN_LAYERS[in_layer[2]]}"


if __name__ == "__main__":
    write_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
