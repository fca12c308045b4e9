"""Backends that are wrong in one way each: what the conformance suite must catch.

Each is the reference with one defect that other implementations have had, or might.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from lfm2kit import specs
from lfm2kit.backend import (
    BF16,
    F32,
    HOST,
    Block,
    Format,
    HostMemory,
    Memory,
    Room,
    Spec,
    Weights,
)
from lfm2kit.batch import Batch
from lfm2kit.batch_rules import ARRAYS
from lfm2kit.formats import rounded
from lfm2kit.model import RoutedExperts
from lfm2kit.reference import attention, feed_forward, rows, short_conv
from lfm2kit.reference.backend import BLOCKS, ReferenceBackend
from lfm2kit.reference.linear import linear, rms_norm
from lfm2kit.rewrites import StreamedExperts

Build = Callable[[Any, Weights], Block]


class BrokenBackend:
    """The reference backend, but for the blocks of some specs."""

    def __init__(self, instead: dict[type[Spec], Build]) -> None:
        self.instead = instead

    def why_unsupported(self, spec: Spec) -> str | None:
        return ReferenceBackend().why_unsupported(spec)

    def memory(self, spec: Spec) -> Memory:
        return HOST

    def build(self, spec: Spec, weights: Weights) -> Block:
        build: Build = self.instead.get(type(spec), BLOCKS[type(spec)])
        return build(spec, weights)

    def state_bytes(self, spec: Spec, room: Room) -> int:
        return ReferenceBackend().state_bytes(spec, room)


class MultiplesOf256(BrokenBackend):
    """Has kernels for the release's widths alone, and so escapes a suite of narrow blocks."""

    def why_unsupported(self, spec: Spec) -> str | None:
        if getattr(spec, "hidden_size", 0) % 256:
            return "its kernels take multiples of 256"
        return super().why_unsupported(spec)


class Around:
    """A block that does something before or after another's call; state goes to the other."""

    def __init__(self, block: Any) -> None:
        self.block = block

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)


# Routers


class OwnRouter:
    """The reference router in steps that a defect can replace."""

    def __init__(self, spec, weights):
        self.spec = spec
        self.weights = weights

    def logits(self, x):
        return linear(x, self.weights["gate.weight"]).astype(np.float32)

    def scores(self, logits):
        with np.errstate(over="ignore"):
            return (1 / (1 + np.exp(-logits.astype(np.float64)))).astype(np.float32)

    def bias(self):
        bias = self.spec.use_expert_bias
        return self.weights.float32("expert_bias") if bias else np.float32(0)

    def order(self, biased):
        return np.argsort(-biased, axis=1, kind="stable")

    def weigh(self, weights):
        if self.spec.norm_topk_prob:
            weights = weights / (weights.sum(axis=1, keepdims=True) + np.float32(1e-6))
        return weights * np.float32(self.spec.routed_scaling_factor)

    def taken_weights(self, scores, expert_ids):
        return np.take_along_axis(scores, expert_ids, axis=1)

    def __call__(self, x):
        scores = self.scores(self.logits(x))
        expert_ids = self.order(scores + self.bias())[:, : self.spec.num_experts_per_tok]
        weights = self.weigh(self.taken_weights(scores, expert_ids))
        return expert_ids.astype(np.int32), weights.astype(np.float32)


class SoftmaxRouter(OwnRouter):
    def scores(self, logits):
        e = np.exp(logits - logits.max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True)


class BiasInTheWeights(OwnRouter):
    def taken_weights(self, scores, expert_ids):
        return np.take_along_axis(scores + self.bias(), expert_ids, axis=1)


class BiasIgnored(OwnRouter):
    def bias(self):
        return np.float32(0)


class BiasAlwaysAsked(OwnRouter):
    def bias(self):
        return self.weights.float32("expert_bias")


class NeverNormalised(OwnRouter):
    def weigh(self, weights):
        return weights * np.float32(self.spec.routed_scaling_factor)


class AlwaysNormalised(OwnRouter):
    def weigh(self, weights):
        weights = weights / (weights.sum(axis=1, keepdims=True) + np.float32(1e-6))
        return weights * np.float32(self.spec.routed_scaling_factor)


class NoEpsilon(OwnRouter):
    def weigh(self, weights):
        if self.spec.norm_topk_prob:
            weights = weights / weights.sum(axis=1, keepdims=True)
        return weights * np.float32(self.spec.routed_scaling_factor)


class ScalingDropped(OwnRouter):
    def weigh(self, weights):
        total = weights.sum(axis=1, keepdims=True) + np.float32(1e-6)
        return weights / total if self.spec.norm_topk_prob else weights


class HigherIdFirst(OwnRouter):
    def order(self, biased):
        return biased.shape[1] - 1 - np.argsort(-biased[:, ::-1], axis=1, kind="stable")


class LogSigmoid(OwnRouter):
    """Selects by the logarithm of a float32 sigmoid, which underflows."""

    def order(self, biased):
        with np.errstate(divide="ignore"):
            return np.argsort(-np.log(biased), axis=1, kind="stable")

    def scores(self, logits):
        return np.where(logits < -60, 0, super().scores(logits)).astype(np.float32)


class Bf16Logits(OwnRouter):
    def logits(self, x):
        return bf16(super().logits(x))


class Bf16LogitsInLargeBatches(OwnRouter):
    def logits(self, x):
        logits = super().logits(x)
        return bf16(logits) if len(x) > 8 else logits


class Bf16Bias(OwnRouter):
    def bias(self):
        return bf16(np.asarray(super().bias()))


class NaNSortedLast(OwnRouter):
    """Takes the experts whose scores are numbers: a sort by itself does so."""


class SearchedFromTheFirst(OwnRouter):
    """Searches k times for a larger score, which none is where they are NaN."""

    def order(self, biased):
        order = np.zeros((len(biased), self.spec.num_experts_per_tok), np.intp)
        for row, left in enumerate(biased.copy()):
            for k in range(order.shape[1]):
                best = 0
                for e in range(len(left)):
                    best = e if left[e] > left[best] else best
                left[best] = -np.inf
                order[row, k] = best
        return order


class MasksClipped(OwnRouter):
    """Takes -inf for a number too low by mistake."""

    def bias(self):
        return np.maximum(super().bias(), np.float32(-0.1))


class PaddedExperts(OwnRouter):
    """Pads the experts to a multiple of 4 with zeros, and may take one of those."""

    def logits(self, x):
        logits = super().logits(x)
        return np.pad(logits, ((0, 0), (0, -logits.shape[1] % 4)))

    def bias(self):
        padding = -self.spec.num_experts % 4
        return np.pad(np.broadcast_to(super().bias(), (self.spec.num_experts,)), (0, padding))


class FewerThanAllTaken(OwnRouter):
    """Partitions the scores at k, which needs an expert that is not taken."""

    def order(self, biased):
        k = self.spec.num_experts_per_tok
        np.argpartition(-biased, k, axis=1)
        return super().order(biased)


class ScoresIn16Bits(feed_forward.Scores):
    def __call__(self, x):
        return super().__call__(x).astype(np.float16).astype(np.float32)


class ChoiceWeighedByTheBias(feed_forward.Choice):
    def __call__(self, scores):
        bias = self.weights.float32("expert_bias") if self.spec.use_expert_bias else 0
        ids, _ = super().__call__(scores)
        plain = feed_forward.Choice(replace(self.spec, use_expert_bias=False), self.weights)
        return ids, plain((scores + bias).astype(np.float32))[1]


class ChoiceOfTheHigherId(feed_forward.Choice):
    """Turns the experts round, and so the order among equals."""

    def __init__(self, spec, weights):
        if spec.use_expert_bias:
            turned = np.ascontiguousarray(weights.float32("expert_bias")[::-1])
            weights = Weights.of_arrays({"expert_bias": turned})
        super().__init__(spec, weights)

    def __call__(self, scores):
        ids, weights = super().__call__(scores[:, ::-1])
        return self.spec.num_experts - 1 - ids, weights


def bf16(values):
    """Round to BF16 towards zero."""
    return (values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


# Experts and MLP


def w1_w3_swapped(build: Build) -> Build:
    def swapped(spec: Any, weights: Weights) -> Block:
        names = {"w1": "w3", "w3": "w1"}
        return build(spec, Weights({_renamed(name, names): weights[name] for name in weights}))

    return swapped


def _renamed(name: str, names: dict[str, str]) -> str:
    return ".".join(names.get(part, part) for part in name.split("."))


class GateClamped(feed_forward.MLP):
    """Keeps exp from overflowing by a clamp that turns NaN into a number."""

    def __call__(self, x):
        gate = linear(x, self.weights["w1.weight"])
        up = linear(np.nan_to_num(x), self.weights["w3.weight"])
        silu = gate / (1 + np.exp(-np.fmin(np.fmax(gate, -80), 80)))
        return linear(np.nan_to_num(silu) * up, self.weights["w2.weight"]).astype(np.float32)


class EmptyExpertCrashes(feed_forward.Experts):
    def __call__(self, x, expert_ids, expert_weights):
        counts = np.bincount(expert_ids.ravel(), minlength=max(self.experts) + 1)
        if len(x) and not counts[list(self.experts)].all():
            raise ZeroDivisionError("an expert has no rows")
        return super().__call__(x, expert_ids, expert_weights)


class SummedInIdOrder(feed_forward.Experts):
    def __call__(self, x, expert_ids, expert_weights):
        order = np.argsort(expert_ids, axis=1)
        by_id = np.take_along_axis(expert_ids, order, axis=1)
        return super().__call__(x, by_id, np.take_along_axis(expert_weights, order, axis=1))


class SummedInFloat64(feed_forward.Experts):
    """More exact than the contract, and so not what an expert-parallel run can give."""

    def __call__(self, x, expert_ids, expert_weights):
        total = np.zeros(x.shape)
        for k in range(expert_ids.shape[1]):
            for row, e in enumerate(expert_ids[:, k]):
                total[row] += (
                    np.float64(expert_weights[row, k]) * self.experts[int(e)](x[row : row + 1])[0]
                )
        return total.astype(np.float32)


class NobodyIsTheLastExpert(feed_forward.Experts):
    """An id of -1 is an index from the end."""

    def __call__(self, x, expert_ids, expert_weights):
        last = np.int32(max(self.experts, default=-1))
        return super().__call__(x, np.where(expert_ids < 0, last, expert_ids), expert_weights)


class NobodyWeighedByZero(feed_forward.Experts):
    """Computes some expert for an id of -1 and multiplies by 0, which NaN survives."""

    def __call__(self, x, expert_ids, expert_weights):
        some = np.int32(next(iter(self.experts), -1))
        weights = np.where(expert_ids < 0, np.float32(0), expert_weights)
        return super().__call__(x, np.where(expert_ids < 0, some, expert_ids), weights)


class OthersAreRefused(feed_forward.Experts):
    """Looks each id up among its own, and -1 alone is not an error."""

    def __call__(self, x, expert_ids, expert_weights):
        assert set(np.unique(expert_ids)) <= {-1, *self.experts}, "no such expert here"
        return super().__call__(x, expert_ids, expert_weights)


class OthersAreTheLastExpert(feed_forward.Experts):
    """Takes an id beyond its own for its last expert's."""

    def __call__(self, x, expert_ids, expert_weights):
        own = np.int32(max(self.experts, default=-1))
        return super().__call__(x, np.minimum(expert_ids, own), expert_weights)


class OthersWeighedByZero(feed_forward.Experts):
    """Computes the rows of others' experts with one of its own, and weighs them by 0."""

    def __call__(self, x, expert_ids, expert_weights):
        if not self.experts:
            return np.zeros_like(x)
        is_others = (expert_ids >= 0) & ~np.isin(expert_ids, list(self.experts))
        some = np.where(is_others, np.int32(min(self.experts)), expert_ids)
        return super().__call__(x, some, np.where(is_others, np.float32(0), expert_weights))


class NobodyEndsTheRow(feed_forward.Experts):
    """Takes the first -1 for the end of a row's ids."""

    def __call__(self, x, expert_ids, expert_weights):
        ended = np.logical_or.accumulate(expert_ids < 0, axis=1)
        return super().__call__(x, np.where(ended, np.int32(-1), expert_ids), expert_weights)


class LocalExpertsAreARange(feed_forward.Experts):
    """Finds an expert by its distance from the first."""

    def __init__(self, spec, weights):
        super().__init__(spec, weights)
        local = spec.local_experts
        self.experts = {e: self.experts[local[(e - local[0]) % len(local)]] for e in local}


class SomeExpertIsLocal(feed_forward.Experts):
    def __init__(self, spec, weights):
        super().__init__(spec, weights)
        self.first = spec.local_experts[0]


class ExpertsStopAt1024Columns(feed_forward.Experts):
    def __call__(self, x, expert_ids, expert_weights):
        cut = np.where(np.arange(x.shape[1]) < 1024, x, np.float32(0))
        return super().__call__(cut, expert_ids, expert_weights)


class OtherKernelForManyRows(feed_forward.MLP):
    """From 64 rows on, gate and up are swapped."""

    def __call__(self, x):
        if len(x) < 64:
            return super().__call__(x)
        gate, up = linear(x, self.weights["w3.weight"]), linear(x, self.weights["w1.weight"])
        return linear(gate / (1 + np.exp(-gate)) * up, self.weights["w2.weight"]).astype(np.float32)


def reads_all_experts(spec: specs.Experts, weights: Weights) -> Block:
    for name in weights:
        weights.float32(name)
    return feed_forward.Experts(spec, weights)


# Attention


class InterleavedRope(attention.Attention):
    """Rotates neighbours instead of halves."""

    def _rotated(self, heads, name, positions):
        size = self.spec.head_dim
        neighbours = np.arange(size).reshape(2, size // 2, order="F").ravel()  # 0 2 4 .. 1 3 5 ..
        heads = rms_norm(heads, self.weights[f"{name}_layernorm.weight"], self.spec.norm_eps)
        rotated = rotate(self, heads[..., neighbours], positions)
        return rotated[..., np.argsort(neighbours)]


class RopeBeforeNorm(attention.Attention):
    def _rotated(self, heads, name, positions):
        rotated = rotate(self, heads, positions)
        return rms_norm(rotated, self.weights[f"{name}_layernorm.weight"], self.spec.norm_eps)


class ThetaOfTenThousand(attention.Attention):
    def __init__(self, spec, weights):
        super().__init__(replace(spec, rope_theta=10000.0), weights)


class PositionsInBf16(attention.Attention):
    """Exact up to position 256."""

    def _rotated(self, heads, name, positions):
        return super()._rotated(heads, name, bf16(positions))


class NoMaximumSubtracted(attention.Attention):
    def _attend(self, q, k, v):
        group = self.spec.num_attention_heads // self.spec.num_key_value_heads
        scores = np.einsum("qhd,khd->hqk", q, np.repeat(k, group, axis=1)).astype(np.float32)
        scores *= np.float32(self.spec.head_dim**-0.5)
        e = np.tril(np.exp(scores), k=len(k) - len(q))
        e /= e.sum(axis=2, keepdims=True)
        return np.einsum("hqk,khd->qhd", e, np.repeat(v, group, axis=1)).astype(np.float64)


class HeadsInTurn(attention.Attention):
    """Query head h reads key/value head h % kv_heads."""

    def _attend(self, q, k, v):
        order = np.arange(q.shape[1]).reshape(-1, k.shape[1]).T.ravel()
        return super()._attend(q[:, order], k, v)[:, np.argsort(order)]


class SeesTheNextRow(attention.Attention):
    def _attend(self, q, k, v):
        return super()._attend(np.concatenate([q[1:], q[-1:]]), k, v)


class FutureWeighedByZero(attention.Attention):
    """Adds 0 times the values of later rows, which NaN survives."""

    def _weighed(self, weights, v, is_seen):
        return np.einsum("hqk,khd->qhd", weights, v)


class RawBitsOfBiases(short_conv.ShortConv):
    def _linear(self, x, name):
        y = linear(x, self.weights[f"{name}.weight"])
        return y + self.weights[f"{name}.bias"].data.astype(np.float64) if self.spec.bias else y


def rotate(block, heads, positions):
    exponents = np.arange(0, block.spec.head_dim, 2, dtype=np.float32) / block.spec.head_dim
    inverse = (1 / np.float32(block.spec.rope_theta) ** exponents).astype(np.float32)
    angles = (positions.astype(np.float32)[:, None, None] * inverse).astype(np.float64)
    a, b = np.split(heads, 2, axis=2)
    turned = a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)
    return np.concatenate(turned, axis=2)


# State


class ConvStateNotReset(short_conv.ShortConv):
    def _past(self, state, pages, start):
        return super()._past(state, pages, max(start, self.spec.kernel_size - 1))


class ConvPaddedFromThePage(short_conv.ShortConv):
    """Fresh at position 0, but then takes more rows than the sequence has had."""

    def _past(self, state, pages, start):
        if state is None or start == 0:
            return super()._past(state, pages, start)
        before = np.arange(start - self.spec.kernel_size + 1, start, dtype=np.int32)
        return state.rows[state.at(pages, np.maximum(before, 0))]


class ConvLeaksOverBoundaries(short_conv.ShortConv):
    """Convolves the packed rows as if they were one sequence."""

    def __call__(self, x, batch, state):
        if state is None and batch.sequences:
            ends = np.array([0, batch.tokens], dtype=np.int32)
            batch = batch.unchecked(cu_seqlens=ends, pages=batch.pages[:1])
        return super().__call__(x, batch, state)


class ConvShortChunkLosesTaps(short_conv.ShortConv):
    """Knows the rows of the last chunk alone, with zeros where it is shorter than the kernel."""

    def __call__(self, x, batch, state):
        delta = super().__call__(x, batch, state)
        if state is not None:
            for i, pages in enumerate(batch.pages):
                before = np.arange(batch.positions[batch.cu_seqlens[i]], dtype=np.int32)
                state.rows[state.at(pages, before)] = 0
        return delta


class PagesAreRowsOfTheBatch(Around):
    """Takes sequence i's first page to be i, whatever its table says."""

    def __call__(self, x, batch, state):
        pages = batch.pages.copy()
        if pages.size:
            pages[:, 0] = np.arange(batch.sequences, dtype=np.int32)
        return self.block(x, batch.unchecked(pages=pages), state)


class TwoPagesAreOne(Around):
    def __call__(self, x, batch, state):
        return self.block(x, batch.unchecked(pages=batch.pages // 2), state)


class FreshIfTheFirstIs(Around):
    """Looks at the batch's first position alone to tell a prefill from a decode."""

    def __call__(self, x, batch, state):
        is_fresh = batch.sequences > 0 and batch.positions[0] == 0
        if state is not None and is_fresh:
            state.rows[batch.pages] = 0
        return self.block(x, batch, state)


class AttentionReadsWholePages(Around):
    """Masks the unused rows of pages by a weight of zero, which NaN survives."""

    def __call__(self, x, batch, state):
        delta = self.block(x, batch, state)
        if state is not None and len(x):
            used = [state.values[pages[pages >= 0]].sum() for pages in batch.pages]
            delta += np.repeat(0 * np.array(used, np.float32), np.diff(batch.cu_seqlens))[:, None]
        return delta


class WindowTooShort(short_conv.ShortConv):
    """Keeps the rows for the next token, but none for a step back."""

    def new_state(self, room):
        rows = np.empty((room.pages, self.spec.kernel_size - 1, self.spec.hidden_size))
        return short_conv.State(rows, room.page_tokens)


class PagesOf64(Around):
    """Looks for tokens as if every page held 64, whatever the room says."""

    def new_state(self, room):
        return self.block.new_state(Room(room.pages, 64))

    def __call__(self, x, batch, state):
        return self.block(x, batch, state)


class PositionsIn16Bits(Around):
    def __call__(self, x, batch, state):
        positions = batch.positions.astype(np.int16).astype(np.int32)
        return self.block(x, batch.unchecked(positions=np.abs(positions)), state)


class ForkWritesItsFirstPage(Around):
    """Writes a token of the second page into the first one, too."""

    def __call__(self, x, batch, state):
        delta = self.block(x, batch, state)
        if state is not None and batch.pages.shape[1] > 1 and len(x):
            state.keys[batch.pages[0, 0], 3] += 1
        return delta


class StateInTheBlock(Around):
    """Keeps the state that it made last, and ignores the one that it is given."""

    def new_state(self, room):
        self.mine = self.block.new_state(room)
        return "mine"

    def __call__(self, x, batch, state):
        return self.block(x, batch, None if state is None else self.mine)


class EmptyBatchCrashes(Around):
    def __call__(self, x, batch, state):
        if state is not None:
            assert batch.positions[0] >= 0
        return self.block(x, batch, state)


def without_new_state(spec, weights):
    block = short_conv.ShortConv(spec, weights)
    return lambda x, batch, state: block(x, batch, state)


class StateOfNoBytes(BrokenBackend):
    def state_bytes(self, spec, room):
        return 0


# Rows, buffers, results


class NaNForOneRow(Around):
    def __call__(self, x):
        return self.block(x) * (np.float32("nan") if len(x) == 1 else np.float32(1))


class NaNForZeroRows(rows.RMSNorm):
    """Forgets eps."""

    def __call__(self, hidden, delta):
        hidden = hidden if delta is None else hidden + delta
        size = np.sqrt(np.mean(hidden * hidden, axis=-1, keepdims=True))
        with np.errstate(invalid="ignore"):
            return hidden, hidden / size * self.weight.float32()


class NoRowsCrashes(Around):
    def __call__(self, *inputs):
        if len(inputs[0]) == 0:
            raise ValueError("grid of size 0")
        return self.block(*inputs)


class PerturbedByTheNumberOfRows(Around):
    def __call__(self, x):
        return self.block(x) * np.float32(1 + 1e-7 * (len(x) > 8))


class OtherSumForManyRows(feed_forward.MLP):
    """As BLAS does: another order of summation in a matrix product of several rows."""

    def __call__(self, x):
        w2 = self.weights.float32("w2.weight")
        weights = {n: self.weights.float32(n) for n in ("w1.weight", "w3.weight")}
        gate, up = (sums(x, weights[n]) for n in weights)
        return sums(gate / (1 + np.exp(-gate)) * up, w2)


def sums(x, weight):
    """Return x @ weight.T in float32, summed from the other end if there are more than 4 rows."""
    step = -1 if len(x) > 4 else 1
    products = (x[:, None, :] * weight)[:, :, ::step]
    return np.cumsum(products, axis=2, dtype=np.float32)[:, :, -1]


class WritesItsInput(Around):
    def __call__(self, x, *others):
        result = self.block(x, *others)
        if len(x):
            x[-1] += 1
        return result


class WritesTheBatch(Around):
    def __call__(self, x, batch, state):
        result = self.block(x, batch, state)
        batch.positions[...] += 1
        return result


class AddsIntoDelta(rows.RMSNorm):
    def __call__(self, hidden, delta):
        if delta is not None:
            hidden = np.add(hidden, delta, out=delta)
        return super().__call__(hidden, None)


class WritesItsWeights(feed_forward.MLP):
    def __init__(self, spec, weights):
        weights.float32("w1.weight")[...] *= 1
        super().__init__(spec, weights)


class SharedBuffer(Around):
    """Every block returns the same memory."""

    buffer = np.empty(100_000, np.float32)

    def __call__(self, x):
        result = self.block(x)
        out = self.buffer[: result.size].reshape(result.shape)
        out[...] = result
        return out


class FillsOnlyValues(Around):
    """Leaves what was there where nothing is to be added."""

    def __call__(self, *inputs):
        return self.block(*inputs)

    def fill(self, results, *inputs):
        (target,) = results
        delta = self.block(*inputs)
        target[delta != 0] = delta[delta != 0]


class StaleScratch(Around):
    """Pads its rows to a multiple of 4 with old ones, and lets their sum into the result."""

    def __init__(self, block):
        super().__init__(block)
        self.old = np.zeros(1, np.float32)

    def __call__(self, x):
        result = self.block(x) + 0 * self.old.sum()
        self.old = x[:1].copy()
        return result


class RaceBetweenCalls(Around):
    calls = 0

    def __call__(self, x):
        self.calls += 1
        return self.block(x) * np.float32(1 + 2e-7 * (self.calls % 2))


class Float64Result(Around):
    def __call__(self, x):
        return self.block(x).astype(np.float64)


class RawBits(rows.LMHead):
    """Reads BF16's raw bits as if they were values."""

    def __call__(self, x):
        return x @ self.weight.data.astype(np.float32).T


class KnowsThreeFormats(rows.LMHead):
    """Takes the data of any format but BF16 for values."""

    def __call__(self, x):
        weight = self.weight
        return x @ (weight.float32() if weight.format == BF16 else np.float32(weight.data)).T


class EmbeddingIn16Bits(rows.Embedding):
    def __call__(self, batch):
        return super().__call__(batch).astype(np.float16).astype(np.float32)


class HeadIn16Bits(rows.LMHead):
    def __call__(self, x):
        return super().__call__(x.astype(np.float16).astype(np.float32))


class StopsAt1024Columns(Around):
    def __call__(self, x):
        return self.block(np.where(np.arange(x.shape[1]) < 1024, x, np.float32(0)))


class LogitsRowsSorted(rows.LastRows):
    def __call__(self, hidden, delta, batch):
        return super().__call__(
            hidden, delta, replace(batch, logits_rows=np.sort(batch.logits_rows))
        )


class NormIn16Bits(rows.RMSNorm):
    def __call__(self, hidden, delta):
        hidden, x = super().__call__(hidden, delta)
        return hidden, x.astype(np.float16).astype(np.float32)


class NormHidesAnOverflow(rows.RMSNorm):
    """Adds squares in float32; 1 / inf is 0."""

    def __call__(self, hidden, delta):
        hidden = hidden if delta is None else hidden + delta
        with np.errstate(over="ignore"):
            mean = np.mean(hidden * hidden, axis=-1, keepdims=True, dtype=np.float32)
        return hidden, hidden / np.sqrt(mean + np.float32(self.eps)) * self.weight.float32()


class NormDropsDelta(rows.RMSNorm):
    """Norms the sum but hands the residual stream on without it."""

    def __call__(self, hidden, delta):
        return hidden, super().__call__(hidden, delta)[1]


class RaisesForUnknownSpecs(BrokenBackend):
    """Looks a spec up in its table without asking whether it is there."""

    def why_unsupported(self, spec: Spec) -> str | None:
        return None if BLOCKS[type(spec)] else "unreachable"


class LossyMemory:
    name = "lossy"

    def from_host(self, array):
        return array.astype(np.float32)

    def to_host(self, array):
        return array


class LivesInLossyMemory(BrokenBackend):
    def memory(self, spec: Spec) -> Memory:
        return LossyMemory()


class AddsInPlace(HostMemory):
    def add(self, left, right):
        left += right
        return left


class LivesWhereSumsAreInPlace(BrokenBackend):
    def memory(self, spec: Spec) -> Memory:
        return AddsInPlace()


class StreamsTheLayerBefore(BrokenBackend):
    """Each block of streamed experts but the first has the weights of the one before."""

    def __init__(self, replaced) -> None:
        super().__init__(replaced)
        self.before = None

    def why_unsupported(self, spec: Spec) -> str | None:
        return None if isinstance(spec, StreamedExperts) else super().why_unsupported(spec)

    def build(self, spec: Spec, weights: Weights) -> Block:
        if not isinstance(spec, StreamedExperts):
            return super().build(spec, weights)
        block = super().build(spec.experts, weights)
        before, self.before = self.before, block
        return before if spec.position else block


class ReadsRoundedRows(BrokenBackend):
    """Says that its experts read BF16, and has them in a block that takes both."""

    def __init__(self, around: Callable[[Block], Block]) -> None:
        super().__init__({})
        self.around = around

    def row_format(self, spec: Spec) -> Format:
        return BF16 if isinstance(spec, specs.Experts) else F32

    def build(self, spec: Spec, weights: Weights) -> Block:
        block = super().build(spec, weights)
        return self.around(block) if isinstance(spec, specs.Experts) else block


class RowsOf16BitsAsNumbers(Around):
    """Takes the bits of rounded rows for numbers."""

    def __call__(self, x, *experts):
        is_rounded = x.dtype == BF16.block
        values = x.astype(np.float32) if is_rounded else BF16.unpack(rounded(x, BF16))
        return self.block(values, *experts)


class RoundsOnlyWhatTravels(Around):
    """Computes with float32 where no rank has rounded it before."""

    def __call__(self, x, *experts):
        return self.block(BF16.unpack(x) if x.dtype == BF16.block else x, *experts)


class ScratchForNoRows(BrokenBackend):
    def kept_bytes(self, spec: Spec, weights: Weights) -> int:
        return 0

    def scratch_bytes(self, spec: Spec, tokens: int) -> int:
        return 4096 // max(tokens, 1)


class LivesInOverdrawnMemory(BrokenBackend):
    def memory(self, spec: Spec) -> Memory:
        return OverdrawnMemory()


class OverdrawnMemory(HostMemory):
    def free_bytes(self) -> int:
        return -1


class IgnoresTheGivenPart(BrokenBackend):
    def why_not_around(self, spec, parts):
        is_known = isinstance(spec, specs.SparseMoe) and tuple(parts) == ("router.choice",)
        return None if is_known else "it builds a SparseMoe around its choice"

    def build_around(self, spec, weights, parts):
        router = feed_forward.Router(spec.router, weights)
        return RoutedExperts(spec, router, feed_forward.Experts(spec.experts, weights))


class BakedIn:
    """A replay with arrays of the captured batch in it; `copies` names the ones that it copies."""

    nbytes = 0

    def __init__(self, step, batch, copies):
        self.step = step
        self.batch = batch
        self.copies = copies

    def __call__(self, batch):
        return self.step(self.batch.unchecked(**{n: getattr(batch, n) for n in self.copies}))

    def close(self):
        pass


class BakesIn(BrokenBackend):
    """Captures a forward, but copies only some arrays of the batches that come later."""

    def __init__(self, *baked_in: str) -> None:
        super().__init__({})
        self.copies = set(ARRAYS) - set(baked_in)

    def capture(self, step, batch):
        return BakedIn(step, batch, self.copies)


class BakesInTheState(BrokenBackend):
    """Captures the forward with the first state that comes, and replays it with all others."""

    def __init__(self) -> None:
        super().__init__({})
        self.steps = {}

    def capture(self, step, batch):
        step = self.steps.setdefault(batch.form, step)
        return BakedIn(step, batch, ARRAYS)


class TakesPaddingForTokens(BrokenBackend):
    """Says that its blocks take padding rows; one kind gives them to the reference as tokens."""

    def __init__(self, kind: type[Spec]) -> None:
        super().__init__({kind: lambda spec, weights: _OfTokens(BLOCKS[kind](spec, weights))})

    def takes_padding(self, spec: Spec) -> bool:
        return True


class _OfTokens(Around):
    def __call__(self, *inputs):
        return self.block(*map(self._of_tokens, inputs))

    @staticmethod
    def _of_tokens(value):
        if not isinstance(value, Batch):
            return value
        ids, positions = np.maximum(value.token_ids, 0), np.maximum(value.positions, 0)
        return value.unchecked(token_ids=ids % 8, positions=positions)


class CannotBeClosed(BrokenBackend):
    def capture(self, forward, batch):
        return forward


def around(kind: type[Spec], wrapper: Callable[[Block], Block]) -> BrokenBackend:
    """Return the reference with one kind of block inside a wrapper."""
    return BrokenBackend({kind: lambda spec, weights: wrapper(BLOCKS[kind](spec, weights))})


def with_swapped_weights() -> BrokenBackend:
    return BrokenBackend({kind: w1_w3_swapped(BLOCKS[kind]) for kind in (specs.MLP, specs.Experts)})
