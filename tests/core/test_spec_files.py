"""A model described by a TOML file of specs."""

from __future__ import annotations

from pathlib import Path

import pytest

from lfm2kit.errors import Lfm2kitError
from lfm2kit.spec_files import read_spec
from tests.core.small import small_spec

SMALL = """
vocab_size = 50
hidden_size = 24
eps = 1e-5
norm_eps = 1e-5
rope_theta = 5000
kernel_size = 3

[[layers]]
operator = { type = "ShortConv" }
feed_forward = { type = "MLP", intermediate_size = 40 }

[[layers]]
operator = { type = "Attention", num_attention_heads = 4, num_key_value_heads = 2, head_dim = 6 }
feed_forward = { type = "MLP", intermediate_size = 40 }

[[layers]]
operator = { type = "ShortConv" }
[layers.feed_forward]
type = "SparseMoe"
num_experts = 5
num_experts_per_tok = 3
use_expert_bias = true
norm_topk_prob = true
routed_scaling_factor = 1.5
intermediate_size = 12

[[layers]]
operator = { type = "Attention", num_attention_heads = 4, num_key_value_heads = 2, head_dim = 6 }
[layers.feed_forward]
type = "SparseMoe"
num_experts = 5
num_experts_per_tok = 3
use_expert_bias = true
norm_topk_prob = true
routed_scaling_factor = 1.5
intermediate_size = 12
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "model.toml"
    path.write_text(text)
    return path


def test_it_says_the_same_as_a_config(tmp_path: Path) -> None:
    assert read_spec(written(tmp_path, SMALL)) == small_spec()


def test_repeat_makes_equal_layers(tmp_path: Path) -> None:
    head, layer = SMALL.split("[[layers]]")[:2]
    spec = read_spec(written(tmp_path, f"{head}[[layers]]\nrepeat = 7\n{layer}"))
    assert len(spec.layers) == 7
    assert len(set(spec.layers)) == 1


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('type = "ShortConv"', 'type = "Mamba"', "Mamba"),
        ('{ type = "ShortConv" }', "3", "operator"),
        ("intermediate_size = 40", "intermediate_size = -1", "intermediate_size"),
        ("intermediate_size = 40", "width = 40", "width"),
        ("vocab_size = 50", "", "vocab_size"),
        ("eps = 1e-5", 'eps = "small"', "eps"),
        ("use_expert_bias = true", "use_expert_bias = 1", "use_expert_bias"),
        ("kernel_size = 3", "kernel_size = 0", "kernel_size"),
        ("[[layers]]", "[[layer]]", "layers"),
        ("num_key_value_heads = 2", "num_key_value_heads = 3", "num_key_value_heads"),
        ("num_experts_per_tok = 3", "num_experts_per_tok = 6", "num_experts_per_tok"),
        ("[[layers]]", "[[layers]", "TOML"),
        (
            "vocab_size = 50",
            'vocab_size = 50\ntie_word_embeddings = "false"',
            "tie_word_embeddings",
        ),
        ("vocab_size = 50", "vocab_size = 50\nvocab_sise = 50", "Did you mean 'vocab_size'"),
        ("vocab_size = 50", "vocab_size = 50\n[rope]\nx = 1", "no key 'rope'"),
        ("vocab_size = 50", "vocab_size = 50\nvocab_size = 51", "TOML"),
        ('type = "ShortConv"', 'type = "ShortConv", hidden_size = 48', "hidden_size"),
        ("[[layers]]", "[[layers]]\nrepeat = true", "repeat"),
        ("[[layers]]", "[[layers]]\nrepeat = 1025", "repeat"),
        ("[[layers]]", "[[layers]]\nrepeat = 1000", "more than 1024 layers"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(tmp_path: Path, old: str, new: str, named: str) -> None:
    with pytest.raises(Lfm2kitError, match=named) as caught:
        read_spec(written(tmp_path, SMALL.replace(old, new)))
    assert "\n" not in str(caught.value)
    assert "model.toml" in str(caught.value)
