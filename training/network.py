"""LFM2-MoE in torch, for training: plain and dense, with the checkpoint's names.

Each layer adds two deltas to the residual stream: a convolution or attention, and an MLP or
experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lfm2kit.checkpoint.config import CONV, ModelConfig


class Norm(nn.Module):
    """RMSNorm over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class ShortConv(nn.Module):
    """A causal convolution of a few taps, between two gates."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, taps = config.hidden_size, config.conv_L_cache
        self.in_proj = nn.Linear(hidden, 3 * hidden, bias=False)
        self.conv = nn.Conv1d(hidden, hidden, taps, groups=hidden, bias=False)
        self.out_proj = nn.Linear(hidden, hidden, bias=False)
        self.taps = taps

    def forward(self, x: Tensor) -> Tensor:
        b, c, values = self.in_proj(x).chunk(3, dim=-1)
        past = functional.pad(b * values, (0, 0, self.taps - 1, 0))
        length = x.shape[1]
        taps = self.conv.weight[:, 0]  # [hidden, taps]; the last is for the token itself
        mixed = sum(past[:, i : i + length] * taps[:, i] for i in range(self.taps))
        return self.out_proj(c * mixed)


class Attention(nn.Module):
    """Causal attention of groups of heads, with norms of queries and keys, and RoPE."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head = config.hidden_size // config.num_attention_heads
        self.group = config.num_attention_heads // config.num_key_value_heads
        keys = config.num_key_value_heads * self.head
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.q_layernorm = Norm(self.head, config.norm_eps)
        self.k_layernorm = Norm(self.head, config.norm_eps)
        self.theta = config.rope_theta

    def forward(self, x: Tensor) -> Tensor:
        cos, sin = self._angles(x)
        q = rotated(self.q_layernorm(self._heads(self.q_proj(x))), cos, sin)
        k = rotated(self.k_layernorm(self._heads(self.k_proj(x))), cos, sin)
        v = self._heads(self.v_proj(x))
        k, v = (t.repeat_interleave(self.group, dim=1) for t in (k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head)).transpose(1, 2)

    def _angles(self, x: Tensor) -> tuple[Tensor, Tensor]:
        exponents = torch.arange(0, self.head, 2, device=x.device, dtype=torch.float32) / self.head
        positions = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)
        angles = positions[:, None] * (1.0 / self.theta**exponents)
        both_halves = torch.cat((angles, angles), dim=-1)
        return both_halves.cos(), both_halves.sin()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return heads turned by RoPE; the first half of a head pairs with the second."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class MLP(nn.Module):
    """w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.w1 = nn.Linear(hidden, inner, bias=False)
        self.w3 = nn.Linear(hidden, inner, bias=False)
        self.w2 = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class Experts(nn.Module):
    """All experts as three stacked matrices; each token's weights are 0 for those not chosen.

    Computing every expert for every token is faster than gathering, at this size.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        count, hidden, inner = (
            config.num_experts,
            config.hidden_size,
            config.moe_intermediate_size,
        )
        self.w1 = nn.Parameter(torch.empty(count, inner, hidden))
        self.w3 = nn.Parameter(torch.empty(count, inner, hidden))
        self.w2 = nn.Parameter(torch.empty(count, hidden, inner))

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        gate, up = (functional.linear(x, w.flatten(0, 1)) for w in (self.w1, self.w3))
        inner = (functional.silu(gate) * up).unflatten(-1, (len(self.w1), -1))
        weighted = inner * weights[..., None]
        return functional.linear(weighted.flatten(-2), self.w2.transpose(0, 1).flatten(1))


class SparseMoe(nn.Module):
    """A router with a bias that chooses but does not weigh, and its experts.

    `load` counts the tokens that each expert got since somebody set it to 0.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(config)
        self.expert_bias: Tensor
        self.load: Tensor
        self.register_buffer("expert_bias", torch.zeros(config.num_experts))
        self.register_buffer("load", torch.zeros(config.num_experts), persistent=False)
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.sigmoid(self.gate(x))
        ids = (scores + self.expert_bias).topk(self.config.num_experts_per_tok).indices
        chosen = scores.gather(-1, ids)
        if self.config.norm_topk_prob:
            chosen = chosen / (chosen.sum(-1, keepdim=True) + 1e-6)
        chosen = chosen * self.config.routed_scaling_factor
        weights = torch.zeros_like(scores).scatter(-1, ids, chosen)
        with torch.no_grad():
            self.load += torch.zeros_like(scores).scatter(-1, ids, 1.0).flatten(0, -2).sum(0)
        return self.experts(x, weights)


class Layer(nn.Module):
    """A convolution or attention, then an MLP or experts."""

    def __init__(self, config: ModelConfig, index: int, dropout: float) -> None:
        super().__init__()
        self.operator_norm = Norm(config.hidden_size, config.norm_eps)
        self.ffn_norm = Norm(config.hidden_size, config.norm_eps)
        if config.layer_types[index] == CONV:
            self.conv = ShortConv(config)
        else:
            self.self_attn = Attention(config)
        is_dense = index < config.num_dense_layers
        self.feed_forward = MLP(config) if is_dense else SparseMoe(config)
        self.dropout = dropout

    def forward(self, hidden: Tensor) -> Tensor:
        operator = self.conv if hasattr(self, "conv") else self.self_attn
        hidden = hidden + self._dropped(operator(self.operator_norm(hidden)))
        return hidden + self._dropped(self.feed_forward(self.ffn_norm(hidden)))

    def _dropped(self, delta: Tensor) -> Tensor:
        return functional.dropout(delta, self.dropout, self.training)


class Network(nn.Module):
    """(ids [sequences, tokens]) -> logits [sequences, tokens, vocab_size]; tied embedding."""

    def __init__(self, config: ModelConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Layer(config, i, dropout) for i in range(config.num_hidden_layers)
        )
        self.embedding_norm = Norm(config.hidden_size, config.norm_eps)
        self.apply(_initialise)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed_tokens(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return functional.linear(self.embedding_norm(hidden), self.embed_tokens.weight)

    def routers(self) -> dict[int, SparseMoe]:
        """Return the blocks that have a router, by their layers."""
        blocks = enumerate(layer.feed_forward for layer in self.layers)
        return {i: block for i, block in blocks if isinstance(block, SparseMoe)}


def _initialise(module: nn.Module) -> None:
    """Draw the weights of a module itself: a standard deviation of 0.02, more for few inputs."""
    parameters: dict[str, Any] = dict(module.named_parameters(recurse=False))
    for name, parameter in parameters.items():
        if isinstance(module, Norm):
            continue
        inputs = parameter[0].numel() if name == "weight" else parameter.shape[-1]
        is_table = isinstance(module, nn.Embedding)
        nn.init.normal_(parameter, std=0.02 if is_table else inputs**-0.5)
