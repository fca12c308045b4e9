"""The specs that every kind of block is judged by.

Of each kind first a small one of odd sizes, then more of them, then one whose sizes are those of
published models made narrow, for backends that take only multiples of something.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import TypeVar

from lfm2kit import specs
from lfm2kit.checkpoint.config import ATTENTION, CONV, ModelConfig, model_spec
from lfm2kit.specs import Spec
from lfm2kit.testing.widths import Widths, resized

S = TypeVar("S", bound=Spec)

EPS = 1e-5


def experts(hidden: int, size: int, count: int, taken: int) -> specs.Experts:
    return specs.Experts(hidden, size, count, taken, tuple(range(count)))


NORM = specs.RMSNorm(24, EPS)
WIDE_NORM = specs.RMSNorm(128, EPS)
MOE = specs.SparseMoe(specs.Router(24, 5, 3, True, True, 1.5), experts(24, 12, 5, 3))
WIDE_MOE = specs.SparseMoe(specs.Router(128, 32, 4, True, True, 1.0), experts(128, 64, 32, 4))
ROUTERS = (
    MOE.router,
    specs.Router(13, 12, 1, True, False, 1.0),
    specs.Router(17, 33, 8, False, True, 1.0),
    WIDE_MOE.router,
)
Operator = specs.ShortConv | specs.Attention
OPERATORS: tuple[Operator, ...] = (
    specs.ShortConv(24, 3),
    specs.Attention(24, 4, 2, 6, 5000.0, EPS),
)
WIDE_OPERATORS: tuple[Operator, ...] = (
    specs.ShortConv(128, 3),
    specs.Attention(128, 4, 2, 64, 1e6, EPS),
)


def _layers() -> Iterator[specs.Layer]:
    narrow: tuple[Spec, ...] = (specs.MLP(24, 40), MOE)
    wide: tuple[Spec, ...] = (specs.MLP(128, 96), WIDE_MOE)
    for operator, feed_forward in product(OPERATORS, narrow):
        yield specs.Layer(NORM, operator, NORM, feed_forward)
    for operator, feed_forward in product(WIDE_OPERATORS, wide):
        yield specs.Layer(WIDE_NORM, operator, WIDE_NORM, feed_forward)


CASES: dict[str, tuple[Spec, ...]] = {
    "embed": (specs.Embedding(50, 24), specs.Embedding(37, 13), specs.Embedding(256, 128)),
    "norm": (NORM, specs.RMSNorm(13, 1e-2), specs.RMSNorm(1, EPS), WIDE_NORM),
    "conv": (
        OPERATORS[0],
        specs.ShortConv(13, 3, bias=True),
        specs.ShortConv(10, 1),
        specs.ShortConv(9, 2, bias=True),
        specs.ShortConv(17, 4),
        WIDE_OPERATORS[0],
    ),
    "attn": (
        OPERATORS[1],
        specs.Attention(20, 3, 1, 16, 1e6, 1e-2),
        specs.Attention(33, 4, 4, 8, 10000.0, EPS),
        specs.Attention(14, 6, 2, 2, 5e6, EPS),
        WIDE_OPERATORS[1],
    ),
    "mlp": (specs.MLP(24, 40), specs.MLP(13, 7), specs.MLP(128, 96)),
    "scores": tuple(router.scores for router in ROUTERS),
    "choice": tuple(router.choice for router in ROUTERS),
    "router": ROUTERS,
    "experts": (MOE.experts, experts(13, 7, 12, 1), experts(17, 9, 33, 8), WIDE_MOE.experts),
    "moe": (MOE, WIDE_MOE),
    "rows": (specs.LastRows(24), specs.LastRows(13), specs.LastRows(128)),
    "head": (specs.LMHead(50, 24), specs.LMHead(37, 13), specs.LMHead(256, 128)),
    "layer": tuple(_layers()),
}

# The widths of LFM2-8B-A1B, where reductions are long, but fewer experts.  Large ids of a
# vocabulary have a check of their own.
REAL_WIDTHS: tuple[Spec, ...] = (
    specs.Embedding(37, 2048),
    specs.LastRows(2048),
    specs.LMHead(37, 2048),
    specs.RMSNorm(2048, EPS),
    specs.ShortConv(2048, 3),
    specs.Attention(2048, 32, 8, 64, 1e6, EPS),
    specs.MLP(2048, 1792),
    specs.Router(2048, 32, 4, True, True, 1.0),
    experts(2048, 1792, 2, 2),
)


# A backend that builds none of a check's specs of a kind is judged at the first width it takes.
WIDTHS = (256, 512, 1024, 2048)


def widened(spec: S, width: int) -> S:
    """Return `spec` with `width` for its own widths, and heads of 64 as in the release."""
    return resized(spec, Widths.of(width))


def _config(hidden: int, head_dim: int, experts: int, taken: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=50,
        hidden_size=hidden,
        intermediate_size=hidden + 16,
        moe_intermediate_size=hidden // 2,
        layer_types=(CONV, ATTENTION, CONV, ATTENTION),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        num_dense_layers=2,
        num_experts=experts,
        num_experts_per_tok=taken,
        norm_topk_prob=True,
        use_expert_bias=True,
        routed_scaling_factor=1.5,
        conv_L_cache=3,
        conv_bias=False,
        norm_eps=EPS,
        rope_theta=5000.0,
        tie_word_embeddings=True,
    )


# conv + mlp, attention + mlp, conv + moe, attention + moe
MODELS = (
    model_spec(_config(24, 6, 5, 3), tied=True),
    model_spec(_config(128, 64, 32, 4), tied=True),
)
