"""Causal grouped-query attention with normed, rotated queries and keys."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lfm2kit import specs
from lfm2kit.backend import Room, Weights
from lfm2kit_torch.batches import Sequence, TensorBatch, page_and_place
from lfm2kit_torch.device import Device
from lfm2kit_torch.linear import Linear, rms_norm, stored

SCORES = 1 << 22  # of a piece of queries in all heads, at most, if it has more than one query
SCORE_BYTES = 4 + 8 + 8  # a score, and softmax's argument and result in doubles


class State(NamedTuple):
    keys: Tensor  # [pages, page_tokens, kv_heads, head_dim]
    values: Tensor


class Attention:
    def __init__(self, spec: specs.Attention, weights: Weights, device: Device) -> None:
        self.spec = spec
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            Linear(weights.scope(name), device) for name in names
        )
        self.q_norm = stored(weights, "q_layernorm.weight", device)
        self.k_norm = stored(weights, "k_layernorm.weight", device)
        self.thetas = device.weight(_thetas(spec))

    def __call__(self, x: Tensor, batch: TensorBatch, state: State | None) -> Tensor:
        q = self._rotated(self._heads(self.q_proj(x)), self.q_norm, batch.positions)
        k = self._rotated(self._heads(self.k_proj(x)), self.k_norm, batch.positions)
        v = self._heads(self.v_proj(x))
        heads = torch.empty_like(q)
        for one in batch.sequences():
            keys, values = k[one.rows], v[one.rows]
            if state is not None:
                keys = _extended(state.keys, one, keys)
                values = _extended(state.values, one, values)
            heads[one.rows] = self._attend(q[one.rows], keys, values)
        return self.out_proj(heads.flatten(1))

    def new_state(self, room: Room) -> State:
        shape = state_shape(self.spec, room)
        return State(self.thetas.new_empty(shape), self.thetas.new_empty(shape))

    def _heads(self, y: Tensor) -> Tensor:
        return y.unflatten(1, (-1, self.spec.head_dim))  # [tokens, heads, head_dim]

    def _rotated(self, heads: Tensor, weight: Tensor, positions: Tensor) -> Tensor:
        """Norm over head_dim, then RoPE: (a, b) -> (a cos - b sin, b cos + a sin), by halves."""
        a, b = rms_norm(heads, weight, self.spec.norm_eps).chunk(2, dim=2)
        angles = positions.float()[:, None, None] * self.thetas
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend with q [tokens, heads, head_dim] to k and v [context, kv_heads, head_dim].

        The last of them are the tokens' own.  Scores are computed for a piece of the queries at a
        time: those of a long prompt would take gigabytes.
        """
        tokens, past = len(q), len(k) - len(q)
        rows = max(1, SCORES // (self.spec.num_attention_heads * len(k)))
        heads = torch.empty_like(q)
        for begin in range(0, tokens, rows):
            end = min(begin + rows, tokens)
            seen = slice(past + end)
            heads[begin:end] = self._attend_at_once(q[begin:end], k[seen], v[seen])
        return heads

    def _attend_at_once(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens, context = len(q), len(k)
        q = q.unflatten(1, (self.spec.num_key_value_heads, -1))  # v: kv_heads, g: their queries
        scores = torch.einsum("qvgd,kvd->vgqk", q, k) * self.spec.head_dim**-0.5
        is_future = torch.ones(tokens, context, dtype=torch.bool, device=q.device)
        is_future = is_future.triu(context - tokens + 1)
        # Doubles, because over 100,000 keys the roundings of float32 sums show.
        weights = scores.masked_fill_(is_future, -torch.inf).softmax(-1, dtype=torch.float64)
        return _weighed(weights, v).flatten(1, 2)


def _weighed(weights: Tensor, v: Tensor) -> Tensor:
    """Return the values' weighted sums, NaN where a row sees one that is not finite.

    A weight of 0 would not hide it from the rows before: 0 * NaN is NaN.
    """
    finite = v.where(v.isfinite(), 0).double()
    heads = torch.einsum("vgqk,kvd->qvgd", weights, finite).float()
    zeros = (0 * v).cumsum(0)  # but NaN from the first value on that is not finite
    return heads + zeros[-len(heads) :, :, None]


def _thetas(spec: specs.Attention) -> npt.NDArray[np.float32]:
    """Return the angles of position 1, rounded as transformers rounds them: it shows at 1000."""
    exponents = np.arange(0, spec.head_dim, 2, dtype=np.float32) / spec.head_dim
    return (1 / np.float32(spec.rope_theta) ** exponents).astype(np.float32)


def _extended(cache: Tensor, one: Sequence, new: Tensor) -> Tensor:
    """Put a sequence's new rows into its pages; return all of its rows, the earlier ones too."""
    page_tokens = cache.shape[1]
    cache[page_and_place(one.pages, one.positions, page_tokens)] = new
    end = one.start + len(new)
    used = one.pages[: -(-end // page_tokens)]
    return cache[used].flatten(0, 1)[:end]


def scratch_bytes(spec: specs.Attention, tokens: int) -> int:
    """Count what one sequence of `tokens` tokens needs: q and its result, k, v, and the scores."""
    heads = 2 * (spec.num_attention_heads + spec.num_key_value_heads)
    per_query = spec.num_attention_heads * tokens
    scores = max(per_query, min(SCORES, per_query * tokens))
    return 4 * tokens * heads * spec.head_dim + SCORE_BYTES * scores


def state_shape(spec: specs.Attention, room: Room) -> tuple[int, int, int, int]:
    return room.pages, room.page_tokens, spec.num_key_value_heads, spec.head_dim
