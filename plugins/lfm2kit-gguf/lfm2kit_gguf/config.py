"""The model that a file's keys describe, as a configuration of lfm2kit.

llama.cpp knows one way to route: sigmoid scores, a bias that only selects, and weights whose sum
is 1.  What it has no key for is as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import repr as brief  # of what a file says, however long it is
from typing import Any, NamedTuple

from lfm2kit.checkpoint.config import ATTENTION, CONV, DENSE, MOE, ModelConfig, parse_config
from lfm2kit.errors import Lfm2kitError
from lfm2kit_gguf.header import Header

ARCHITECTURE = "general.architecture"
TYPES = {"lfm2moe": MOE, "lfm2": DENSE}  # of models, by their architecture
SIGMOID = 2  # how llama.cpp numbers the ways in which experts are scored

# The keys of whole numbers and of others, by their names in a config.json.
KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "conv_L_cache": "shortconv.l_cache",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
KEYS_OF_EXPERTS = {
    "moe_intermediate_size": "expert_feed_forward_length",
    "num_dense_layers": "leading_dense_block_count",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
}
OPTIONAL_KEYS = {
    "vocab_size": "vocab_size",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
}
# Keys that say the same as `head_dim`, if they are there.
HEAD_DIMS = ("attention.value_length", "rope.dimension_count")
# What no key of llama.cpp says of these architectures.
ALWAYS = {
    "conv_bias": False,
    "norm_topk_prob": True,
    "use_expert_bias": True,
    "routed_scaling_factor": 1.0,
    "block_auto_adjust_ff_dim": False,
}


class Fixed(NamedTuple):
    """A key for which lfm2kit supports some values alone."""

    values: tuple[Any, ...]
    what: str


FIXED: Mapping[str, Fixed] = {
    "expert_gating_func": Fixed((SIGMOID, None), "experts that are scored by a sigmoid"),
    "expert_weights_norm": Fixed((True, None), "experts whose weights add up to 1"),
    "expert_weights_scale": Fixed((1.0, 0.0, None), "experts that are not scaled"),
    "rope.scaling.type": Fixed(("none", None), "RoPE that is not scaled"),
    "attention.causal": Fixed((True, None), "causal attention"),
    "attention.sliding_window": Fixed((0, None), "attention to all earlier tokens"),
}


def config_of(header: Header, vocab_size: int) -> ModelConfig:
    """Return the configuration; `vocab_size`, the embedding's rows, counts where no key has it.

    Raise `Lfm2kitError` for another architecture, and for a key that is missing or wrong.
    """
    architecture = header.value(ARCHITECTURE)
    if not isinstance(architecture, str) or architecture not in TYPES:
        raise Lfm2kitError(
            f"{header.path}: its architecture is {brief(architecture)}; "
            f"lfm2kit runs {' and '.join(TYPES)}"
        )
    keys = Keys(header, architecture)
    keys.check_fixed()
    fields = {"vocab_size": vocab_size} | keys.fields()
    try:
        config = parse_config(ALWAYS | fields | {"model_type": TYPES[architecture]})
    except Lfm2kitError as error:
        raise Lfm2kitError(f"{header.path}: ", *error.args) from None
    keys.check_heads(config.head_dim)
    return config


class Keys:
    """The keys of an architecture."""

    def __init__(self, header: Header, architecture: str) -> None:
        self._header = header
        self._architecture = architecture

    def check_fixed(self) -> None:
        """Raise `Lfm2kitError` for a value that would need another model than lfm2kit has."""
        for key, fixed in FIXED.items():
            self._check(key, fixed.values, fixed.what)

    def check_heads(self, head_dim: int) -> None:
        """Raise `Lfm2kitError` if values have another width than keys, or RoPE leaves some out."""
        for key in HEAD_DIMS:
            self._check(key, (head_dim, None), f"{head_dim}, the width of a head")

    def _check(self, key: str, values: tuple[Any, ...], what: str) -> None:
        if (value := self._get(key)) not in values:
            name = f"{self._architecture}.{key}"
            raise Lfm2kitError(
                f"{self._header.path}: {name} is {brief(value)}; lfm2kit supports only {what}"
            )

    def fields(self) -> dict[str, Any]:
        """Return what a config.json would say."""
        experts = KEYS_OF_EXPERTS if TYPES[self._architecture] == MOE else {}
        needed = {name: self._need(key) for name, key in (KEYS | experts).items()}
        others = {name: self._get(key) for name, key in OPTIONAL_KEYS.items()}
        known = {name: value for name, value in others.items() if value is not None}
        return needed | known | self._heads(needed)

    def _heads(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the kinds of the layers, by their numbers of key heads, of which a conv has 0."""
        key = "attention.head_count_kv"
        layers, heads = fields["num_hidden_layers"], self._need(key)
        by_layer = heads if isinstance(heads, list) else [heads] * min(_whole(layers), 1024)
        several = sorted(set(by_layer) - {0})
        if len(by_layer) != layers or len(several) > 1:
            raise Lfm2kitError(
                f"{self._header.path}: {self._architecture}.{key} is {brief(heads)}; expected 0 or "
                f"one other number for each of {brief(layers)} layers"
            )
        kinds = [ATTENTION if count else CONV for count in by_layer]
        return {"layer_types": kinds, "num_key_value_heads": several[0] if several else 1}

    def _need(self, key: str) -> Any:
        if (value := self._get(key)) is None:
            name = f"{self._architecture}.{key}"
            raise Lfm2kitError(f"{self._header.path}: key '{name}' is missing")
        return value

    def _get(self, key: str) -> Any:
        return self._header.value(f"{self._architecture}.{key}")


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 0
