"""The model as data: frozen dataclasses whose docstrings are the contracts of their blocks.

A block built for a spec is called exactly as its spec's docstring says.  Tensors are flat over
tokens; activations, residual stream and logits are float32; integers are int32.  `parameters()`
names a spec's weights as the checkpoint does, relative to the block's scope; weights are
`[out, in]`.  Formulas: the `lfm2_moe` implementation in Hugging Face transformers.

Arrays that blocks are given, and that they return, are C-contiguous.  Every block accepts zero
rows.  No result may depend on which other rows are in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from reprlib import repr as brief  # of what a caller gives, however long it is
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from lfm2kit.batch import Batch
from lfm2kit.errors import Lfm2kitError
from lfm2kit.memory import HOST
from lfm2kit.weights import Tensor, Weights

Shape = tuple[int, ...]


class Work(NamedTuple):
    """The least that a block must do: floating-point operations, and bytes read or written once."""

    flops: float
    bytes: float

    def __add__(self, other: object) -> Work:
        assert isinstance(other, Work)
        return Work(self.flops + other.flops, self.bytes + other.bytes)


class Part(NamedTuple):
    """A part of a larger spec: its role there, and its scope in the checkpoint's names.

    A plan names it by the kind of its spec, or by `kind`, if it has one.
    """

    role: str
    scope: str
    spec: Spec
    kind: str | None = None


class Spec:
    """A block as data.  `kind` is its name in a plan (`conv`, `moe`, ...).

    A block of a spec that `has_state` takes a state as its last argument, and its `new_state` makes
    one.
    """

    kind: ClassVar[str]
    has_state: ClassVar[bool] = False

    def parameters(self) -> dict[str, Shape]:
        """Name and shape of each weight of this spec and its parts, relative to its scope."""
        return {_join(p.scope, n): s for p in self.parts() for n, s in p.spec.parameters().items()}

    def parts(self) -> tuple[Part, ...]:
        """Return the specs that make up this one if no backend builds it whole; () if plain."""
        return ()

    def work(self, batch: Batch, itemsize: float = 4) -> Work:
        """Return the least work on `batch`, with weights of `itemsize` bytes an element."""
        total = Work(0, 0)
        for part in self.parts():
            total += part.spec.work(batch, itemsize)
        return total

    def derives(self) -> Hashable:
        """Return the key of a derived batch that the parts get; None: they get the block's own.

        `lfm2kit plan` counts the copies of such batches.
        """
        return None

    def note(self) -> str | None:
        """Return what `lfm2kit plan` says about this spec in one line; None for nothing."""
        return None

    def weight_elements(self) -> int:
        return sum(math.prod(shape) for shape in self.parameters().values())

    def check_values(self, weights: Weights) -> None:
        """Raise `Lfm2kitError`, naming the tensor, for values that no block can work with."""
        for part in self.parts():
            part.spec.check_values(weights.scope(part.scope))


@dataclass(frozen=True, slots=True)
class Embedding(Spec):
    """(batch) -> hidden [tokens, hidden_size]: row `batch.token_ids[t]` of `weight`.

    Ids lie in [0, vocab_size): the core has checked them.
    """

    vocab_size: int
    hidden_size: int
    kind: ClassVar[str] = "embed"

    def parameters(self) -> dict[str, Shape]:
        return {"weight": (self.vocab_size, self.hidden_size)}

    def work(self, batch: Batch, itemsize: float = 4) -> Work:
        return Work(0, batch.tokens * self.hidden_size * (itemsize + 4))


@dataclass(frozen=True, slots=True)
class RMSNorm(Spec):
    """(hidden, delta | None) -> (hidden + delta, x), both [rows, hidden_size].

    x = h / sqrt(mean(h^2) + eps) * weight, with h = hidden + delta.  `delta` is a block's output
    not yet added to the residual stream, None before the first layer.  The one block that may
    write an argument: it may add `delta` into `hidden` in place and return that.
    """

    hidden_size: int
    eps: float
    kind: ClassVar[str] = "norm"

    def __post_init__(self) -> None:
        _require(self.eps > 0, f"norm_eps {self.eps} is not positive")

    def parameters(self) -> dict[str, Shape]:
        return {"weight": (self.hidden_size,)}

    def work(self, batch: Batch, itemsize: float = 4) -> Work:
        elements = batch.tokens * self.hidden_size
        return Work(5 * elements, 16 * elements + self.hidden_size * itemsize)


@dataclass(frozen=True, slots=True)
class ShortConv(Spec):
    """(x, batch, state) -> delta; x and delta [tokens, hidden_size].

    B, C, X = split(in_proj(x)) in this order; u = B * X;
    y[t] = sum_j conv.weight[:, 0, j] * u[t - (kernel_size - 1) + j], within t's own sequence only;
    delta = out_proj(C * y).  `bias` adds a bias to in_proj, conv and out_proj.
    State: of each page the newest rows of u, kernel_size - 1 and as many more as a sequence may
    step back (16); rows before a sequence's start are 0.
    """

    hidden_size: int
    kernel_size: int
    bias: bool = False
    kind: ClassVar[str] = "conv"
    has_state: ClassVar[bool] = True
    scope: ClassVar[str] = "conv"

    def parameters(self) -> dict[str, Shape]:
        h = self.hidden_size
        weights: dict[str, Shape] = {
            "in_proj.weight": (3 * h, h),
            "conv.weight": (h, 1, self.kernel_size),
            "out_proj.weight": (h, h),
        }
        if self.bias:
            weights |= {"in_proj.bias": (3 * h,), "conv.bias": (h,), "out_proj.bias": (h,)}
        return weights

    def work(self, batch: Batch, itemsize: float = 4) -> Work:
        h = self.hidden_size
        flops = batch.tokens * h * (8 * h + 2 * self.kernel_size + 2)
        return Work(flops, self.weight_elements() * itemsize + 8 * batch.tokens * h)


@dataclass(frozen=True, slots=True)
class Attention(Spec):
    """(x, batch, state) -> delta; x and delta [tokens, hidden_size].

    Causal grouped-query attention within each sequence.  q, k, v = {q,k,v}_proj(x), in heads of
    head_dim; RMSNorm over head_dim of q and k (`{q,k}_layernorm`, eps) *before* the rotary
    embedding; RoPE in the rotate-half form, theta_i = rope_theta^(-2i / head_dim), angle
    position * theta_i in float32; heads = softmax(q k^T * head_dim^-0.5) v, where query head h
    reads key/value head h // (num_attention_heads / num_key_value_heads);
    delta = out_proj(heads).
    State: the normed and rotated keys, and the values, of every token of each page.
    """

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    kind: ClassVar[str] = "attn"
    has_state: ClassVar[bool] = True
    scope: ClassVar[str] = "self_attn"

    def __post_init__(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        _require(
            heads % kv_heads == 0,
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}",
        )
        _require(self.head_dim % 2 == 0, f"head_dim {self.head_dim} is odd: RoPE needs pairs")
        _require(self.rope_theta > 0, f"rope_theta {self.rope_theta} is not positive")

    def parameters(self) -> dict[str, Shape]:
        h = self.hidden_size
        q_size = self.num_attention_heads * self.head_dim
        kv_size = self.num_key_value_heads * self.head_dim
        return {
            "q_proj.weight": (q_size, h),
            "k_proj.weight": (kv_size, h),
            "v_proj.weight": (kv_size, h),
            "out_proj.weight": (h, q_size),
            "q_layernorm.weight": (self.head_dim,),
            "k_layernorm.weight": (self.head_dim,),
        }

    def work(self, batch: Batch, itemsize: float = 4) -> Work:
        pairs = float(np.sum(batch.on(HOST).positions + 1.0))  # (query, key) pairs that are seen
        projections = 2 * self.weight_elements() * batch.tokens
        flops = projections + 4 * pairs * self.num_attention_heads * self.head_dim
        return Work(flops, self.weight_elements() * itemsize + 8 * batch.tokens * self.hidden_size)


@dataclass(frozen=True, slots=True)
class MLP(Spec):
    """(x) -> delta = w2(silu(w1 x) * w3 x); x and delta [tokens, hidden_size].

    w1 is the gate, w3 the up and w2 the down projection; silu(a) = a / (1 + exp(-a)).
    """

    hidden_size: int
    intermediate_size: int
    kind: ClassVar[str] = "mlp"
    scope: ClassVar[str] = "feed_forward"

    def parameters(self) -> dict[str, Shape]:
        h, m = self.hidden_size, self.intermediate_size
        return {"w1.weight": (m, h), "w3.weight": (m, h), "w2.weight": (h, m)}

    def work(self, batch: Batch, itemsize: float = 4) -> Work:
        elements = self.weight_elements()
        return Work(
            2 * elements * batch.tokens,
            elements * itemsize + 8 * batch.tokens * self.hidden_size,
        )


@dataclass(frozen=True, slots=True)
class Scores(Spec):
    """(x) -> scores = sigmoid(gate(x)), float32 [tokens, num_experts]; x [tokens, hidden_size].

    Logits and scores are rounded to float32 in every precision: a saturated sigmoid is exactly 1.
    A score whose logit is NaN is NaN.  The gate is finite: the core has checked it.
    """

    hidden_size: int
    num_experts: int
    kind: ClassVar[str] = "scores"

    def parameters(self) -> dict[str, Shape]:
        return {"gate.weight": (self.num_experts, self.hidden_size)}

    def check_values(self, weights: Weights) -> None:
        _require_all(weights["gate.weight"], np.isfinite, "a router's gate must be finite")

    def work(self, batch: Batch, itemsize: float = 4) -> Work:
        elements, floats = self.weight_elements(), self.hidden_size + self.num_experts
        return Work(2 * elements * batch.tokens, elements * itemsize + 4 * batch.tokens * floats)


@dataclass(frozen=True, slots=True)
class Choice(Spec):
    """(scores) -> (expert_ids int32, expert_weights float32), both [tokens, num_experts_per_tok].

    `scores` [tokens, num_experts] are numbers from 0 to 1, or NaN.  The experts with the highest
    scores + expert_bias are taken, in descending order, the lower id first among equals; weights =
    the scores *without* the bias, divided by (their sum + 1e-6) if norm_topk_prob, times
    routed_scaling_factor.  Sums with the bias, and weights, are rounded to float32 in every
    precision.  A row's ids are distinct, always.  An expert whose bias is -inf is never taken.
    Where one of a row's scores is NaN, all its weights are NaN, and its ids any that the bias
    allows.  Every id lies in [0, num_experts): a row that only pads a batch gets ids of -1 from
    whoever pads it (see `Experts`).  At least num_experts_per_tok biases are finite, the others
    finite or -inf: the core has checked them.
    """

    num_experts: int
    num_experts_per_tok: int
    use_expert_bias: bool
    norm_topk_prob: bool
    routed_scaling_factor: float
    kind: ClassVar[str] = "choice"

    def __post_init__(self) -> None:
        taken, there = self.num_experts_per_tok, self.num_experts
        _require(taken <= there, f"num_experts_per_tok {taken} is more than num_experts {there}")

    def parameters(self) -> dict[str, Shape]:
        return {"expert_bias": (self.num_experts,)} if self.use_expert_bias else {}

    def check_values(self, weights: Weights) -> None:
        if not self.use_expert_bias:
            return
        bias, taken = weights["expert_bias"], self.num_experts_per_tok
        allowed = "an expert's bias must be finite, or -inf for an expert that is never taken"
        _require_all(bias, lambda x: np.isfinite(x) | np.isneginf(x), allowed)
        finite = int(np.count_nonzero(np.isfinite(bias.float32())))
        _require(
            finite >= taken,
            f"tensor '{bias.name}': {finite} of {self.num_experts} biases are finite, "
            f"but each token takes {taken} experts",
        )

    def work(self, batch: Batch, itemsize: float = 4) -> Work:
        row = self.num_experts + 2 * self.num_experts_per_tok
        return Work(0, 4 * batch.tokens * row)


@dataclass(frozen=True, slots=True)
class Router(Spec):
    """(x) -> choice(scores(x)) = (expert_ids, expert_weights), as `Choice` returns them.

    x [tokens, hidden_size].  The bits are those of the two parts, wherever each is built.
    """

    hidden_size: int
    num_experts: int
    num_experts_per_tok: int
    use_expert_bias: bool
    norm_topk_prob: bool
    routed_scaling_factor: float
    kind: ClassVar[str] = "router"

    def __post_init__(self) -> None:
        self.choice.__post_init__()

    @property
    def scores(self) -> Scores:
        return Scores(self.hidden_size, self.num_experts)

    @property
    def choice(self) -> Choice:
        return Choice(
            self.num_experts,
            self.num_experts_per_tok,
            self.use_expert_bias,
            self.norm_topk_prob,
            self.routed_scaling_factor,
        )

    def parts(self) -> tuple[Part, ...]:
        return Part("scores", "", self.scores), Part("choice", "", self.choice)


@dataclass(frozen=True, slots=True)
class Experts(Spec):
    """(x, expert_ids, expert_weights) -> delta; x and delta [rows, hidden_size].

    delta[t] = sum_k expert_weights[t, k] * E(x[t]), E = the MLP number expert_ids[t, k], for any
    k >= 1.  Each product is rounded to float32 and they are added in the order of k, starting
    from the first: so the sum has the same bits when expert parallelism adds it elsewhere.
    `local_experts` are any ids below num_experts, in any order, without repeats, or none.  Only
    their weights may be asked for.  Every other id is another block's, or -1, which stands for no
    expert.  Such ids may be anywhere: nothing is added for them, whatever the weight beside one is.
    A row that contains no other has a delta of +0, whatever x contains there.
    Over ranks x may have the `row_format` of the backend, if that has one (`ReadsRows`).
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    num_experts_per_tok: int  # what a model's router hands over; expert_ids.shape[1] is what counts
    local_experts: tuple[int, ...]
    kind: ClassVar[str] = "experts"

    def __post_init__(self) -> None:
        local = self.local_experts
        _require(
            len(set(local)) == len(local) and all(0 <= e < self.num_experts for e in local),
            f"local_experts {brief(local)} are not different ids below {self.num_experts}",
        )

    @property
    def expert(self) -> MLP:
        return MLP(self.hidden_size, self.intermediate_size)

    def parameters(self) -> dict[str, Shape]:
        one = self.expert.parameters()
        return {f"experts.{e}.{n}": s for e in self.local_experts for n, s in one.items()}

    def work(self, batch: Batch, itemsize: float = 4) -> Work:
        """Return the work of tokens that choose experts evenly at random, as a mean.

        Those of a router choose fewer different ones: its scores favour some.
        """
        return self.work_among(1, batch.tokens, itemsize)

    def work_among(self, ranks: int, tokens: int, itemsize: float = 4) -> Work:
        """Return the mean work of one of `ranks` that share out all experts, and have `tokens`.

        Any of these tokens may choose the local experts, but each rank has its part of the rows.
        """
        pairs = tokens * self.num_experts_per_tok
        one = self.expert.weight_elements()
        unread = (1 - self.num_experts_per_tok / self.num_experts) ** tokens
        read = (1 - unread) * len(self.local_experts) * one * itemsize
        return Work(2 * one * pairs / ranks, read + 8 * tokens * self.hidden_size / ranks)


@dataclass(frozen=True, slots=True)
class SparseMoe(Spec):
    """(x) -> delta = experts(x, *router(x)); x and delta [tokens, hidden_size]."""

    router: Router
    experts: Experts
    kind: ClassVar[str] = "moe"
    scope: ClassVar[str] = "feed_forward"

    def parts(self) -> tuple[Part, ...]:
        return Part("router", "", self.router), Part("experts", "", self.experts)


@dataclass(frozen=True, slots=True)
class LastRows(Spec):
    """(hidden, delta, batch) -> (hidden, delta) of the rows `batch.logits_rows`, in that order."""

    hidden_size: int
    kind: ClassVar[str] = "rows"

    def parameters(self) -> dict[str, Shape]:
        return {}

    def work(self, batch: Batch, itemsize: float = 4) -> Work:
        return Work(0, 16 * len(batch.logits_rows) * self.hidden_size)


@dataclass(frozen=True, slots=True)
class LMHead(Spec):
    """(x) -> logits [rows, vocab_size] = x @ weight.T; x [rows, hidden_size]."""

    vocab_size: int
    hidden_size: int
    kind: ClassVar[str] = "head"

    def parameters(self) -> dict[str, Shape]:
        return {"weight": (self.vocab_size, self.hidden_size)}

    def work(self, batch: Batch, itemsize: float = 4) -> Work:
        rows, elements = len(batch.logits_rows), self.weight_elements()
        return Work(2 * elements * rows, elements * itemsize + 4 * rows * self.vocab_size)


@dataclass(frozen=True, slots=True)
class Layer(Spec):
    """(hidden, delta, batch, state) -> (hidden, delta), all [tokens, hidden_size].

    hidden, x = operator_norm(hidden, delta); delta = operator(x, batch, state);
    hidden, x = ffn_norm(hidden, delta);      delta = feed_forward(x).
    State: the operator's.
    """

    operator_norm: RMSNorm
    operator: ShortConv | Attention
    ffn_norm: RMSNorm
    feed_forward: Spec  # MLP, SparseMoe, or what a rewrite has put in its place
    kind: ClassVar[str] = "layer"
    has_state: ClassVar[bool] = True

    def parts(self) -> tuple[Part, ...]:
        return (
            Part("operator_norm", "operator_norm", self.operator_norm),
            Part("operator", self.operator.scope, self.operator),
            Part("ffn_norm", "ffn_norm", self.ffn_norm),
            Part("feed_forward", "feed_forward", self.feed_forward),
        )


@dataclass(frozen=True, slots=True)
class Model(Spec):
    """ids -> embedding -> layers -> norm of the last rows -> logits [logits, vocab_size]."""

    embed_tokens: Embedding
    layers: tuple[Spec, ...]  # of `Layer`, or of what a rewrite has put in its place
    last_rows: Spec  # `LastRows`, or the same
    embedding_norm: RMSNorm
    lm_head: LMHead
    tie_word_embeddings: bool = field(default=True)
    max_position_embeddings: int | None = None  # tokens of its longest sequence; None: unknown
    kind: ClassVar[str] = "model"

    def parts(self) -> tuple[Part, ...]:
        return (
            Part("embed_tokens", "embed_tokens", self.embed_tokens),
            *(Part(f"layers.{i}", f"layers.{i}", layer) for i, layer in enumerate(self.layers)),
            Part("last_rows", "last_rows", self.last_rows),
            Part("embedding_norm", "embedding_norm", self.embedding_norm),
            Part(
                "lm_head", "embed_tokens" if self.tie_word_embeddings else "lm_head", self.lm_head
            ),
        )


def leaves(spec: Spec) -> Iterator[Spec]:
    """Yield the plain specs of a spec, in the order of the forward."""
    for _, leaf in leaves_by_kind(spec):
        yield leaf


def leaves_by_kind(spec: Spec, kind: str | None = None) -> Iterator[tuple[str, Spec]]:
    """Yield the plain specs of a spec, each with the kind by which a plan names it.

    That is its own, if neither the spec nor a part around it has been given a `kind`.
    """
    parts = spec.parts()
    if not parts:
        yield kind or spec.kind, spec
    for part in parts:
        yield from leaves_by_kind(part.spec, part.kind or kind)


def _require_all(
    tensor: Tensor, holds: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.bool_]], rule: str
) -> None:
    values = tensor.float32()
    wrong = np.argwhere(~holds(values))
    if len(wrong):
        at = ", ".join(map(str, wrong[0]))
        raise Lfm2kitError(
            f"tensor '{tensor.name}' has {values[tuple(wrong[0])]} at [{at}] "
            f"({len(wrong)} of {values.size} values are wrong): {rule}"
        )


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Lfm2kitError(otherwise)


def _join(scope: str, name: str) -> str:
    return f"{scope}.{name}" if scope else name
