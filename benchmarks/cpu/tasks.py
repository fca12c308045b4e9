"""What the contenders are asked to do, and the goals set for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from contenders import Contender
from engines import BLOCK_SAMPLES, SEQ_LEN

from lfm2kit import specs
from lfm2kit.batch import Batch
from lfm2kit.measuring.bench import random_batch
from lfm2kit.specs import Spec, Work

STEPS = 16  # tokens that a decoding appends to a prompt of `SEQ_LEN`
GROUPS = ("n1", "n16", "n64", "decode", "decode16", "blocks")
KINDS = ("conv", "attn", "moe")
ITEMSIZE = {"F32": 4, "BF16": 2, "F16": 2}


@dataclass(frozen=True)
class Task:
    """A question, how much of its unit an answer amounts to, and the least work that it takes."""

    name: str
    method: str
    arguments: tuple[Any, ...]
    amount: int
    unit: str
    work: Work


def tasks(group: str, spec: specs.Model, dtype: str) -> Iterator[Task]:
    itemsize = ITEMSIZE[dtype]
    vocab_size = spec.embed_tokens.vocab_size
    if group == "blocks":
        yield from (_block(kind, n, spec, itemsize) for kind in KINDS for n in BLOCK_SAMPLES)
    elif group.startswith("decode"):
        yield _decode(group, int(group.removeprefix("decode") or 1), spec, itemsize)
    else:
        n = int(group.removeprefix("n"))
        ids = np.random.default_rng(n).integers(0, vocab_size, (n, SEQ_LEN), dtype=np.int32)
        work = spec.work(Batch.of_sequences(list(ids)), itemsize)
        yield Task(group, "forward", (ids,), n, "samples/s", work)


def _decode(name: str, n: int, spec: specs.Model, itemsize: int) -> Task:
    """Return the decoding of random tokens; a model's own soon use the same few experts."""
    size, rng = spec.embed_tokens.vocab_size, np.random.default_rng(0)
    prompts, ids = np.split(rng.integers(0, size, (n, SEQ_LEN + STEPS), np.int32), [SEQ_LEN], 1)
    work = Work(0, 0)
    for step in range(STEPS):
        batch = Batch.of_sequences(list(ids[:, step : step + 1]), starts=[SEQ_LEN + step] * n)
        work += spec.work(batch, itemsize)
    return Task(name, "decode", (prompts, ids), STEPS * n, "tokens/s", work)


def _block(kind: str, samples: int, spec: specs.Model, itemsize: int) -> Task:
    tokens = samples * SEQ_LEN
    batch = random_batch(samples, SEQ_LEN, spec.embed_tokens.vocab_size, 0)
    block = next(part for part in _walk(spec) if part.kind == kind)
    work = block.work(batch, itemsize)
    return Task(f"{kind} {tokens}", "block", (kind, samples), tokens, "tokens/s", work)


def _walk(spec: Spec) -> Iterator[Spec]:
    yield spec
    for part in spec.parts():
        yield from _walk(part.spec)


LLAMA_BF16 = "llama.cpp BF16"
OURS_F32 = "lfm2kit F32"


def bouts(dtype: str) -> list[tuple[Contender, tuple[str, ...]]]:
    """Return whom lfm2kit meets with weights of `dtype`, and in which groups of tasks."""
    whole = ("n1", "n16", "n64", "decode", "decode16")
    if dtype == "F32":
        return [
            (Contender("transformers grouped_mm", "F32"), GROUPS),
            (Contender("transformers eager", "F32"), GROUPS),
            (Contender("llama.cpp", "F32"), whole),
        ]
    peers = [(Contender("llama.cpp", peer), whole) for peer in dict.fromkeys(("BF16", dtype))]
    return [*peers, (Contender("lfm2kit", "F32"), ("n64",))]


F32_RATIOS = {
    "n1": 1.25,
    "n16": 1.6,
    "n64": 1.25,
    "conv": 1.3,
    "attn": 1.3,
    "moe": 1.5,
    "decode16": 1.2,
}
HALF_RATIOS = {("n1", LLAMA_BF16): 1.7, ("n64", OURS_F32): 1.0, ("decode16", LLAMA_BF16): 1.2}
PEAK_SHARES = {("F32", "n64"): 0.75}
READ_SHARES = {("F32", "decode"): 0.90, ("BF16", "decode"): 0.85, ("F16", "decode"): 0.85}


def ratio_goal(dtype: str, task: str, rival: str) -> float | None:
    """Return how many times as fast as `rival` to be; to beat the best one is to beat each."""
    if dtype == "F32":
        return F32_RATIOS.get(task.split()[0])
    return HALF_RATIOS.get((task, rival))
