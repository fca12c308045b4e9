"""Finds a block of a kind in a plan, and calls it alone, as `lfm2kit bench --block` does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from lfm2kit.batch import Batch
from lfm2kit.building.answers import Answers
from lfm2kit.building.inspecting import inspected
from lfm2kit.building.lacking import Lacking, can_build, in_words
from lfm2kit.building.loading import Setup
from lfm2kit.building.placement import Placed
from lfm2kit.building.results import Checked
from lfm2kit.errors import Lfm2kitError, Option, choices
from lfm2kit.measuring.bench import Contender, itemsize, random_batch
from lfm2kit.memory import Memory

Result = npt.NDArray[Any] | tuple[npt.NDArray[Any], ...]


Draw = Callable[[np.random.Generator, tuple[int, ...]], npt.NDArray[np.float32]]


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Return float32 values of mean 0 and std 1."""
    return rng.standard_normal(shape, np.float32)


def single_blocks(
    setup: Setup,
    kind: str,
    samples: Sequence[int],
    lengths: Sequence[int],
    seed: int,
    draw: Draw = normal,
) -> Iterator[Contender]:
    """Yield the model's first block of `kind`, host arrays in, host arrays out.

    `draw` gives the values of its inputs.
    With the option `check` its results are looked at in a call of their own.  Raise `Lfm2kitError`
    for what is wrong with them, and if the plan builds no such block.
    """
    placed = _first(setup, kind)
    built: list[Checked] = []
    block = setup.build_block(placed, tokens=max(samples) * max(lengths), checked=built)
    rng = np.random.default_rng(seed)
    embed = setup.checkpoint.spec.embed_tokens
    for n, seq_len in product(samples, lengths):
        batch = random_batch(n, seq_len, embed.vocab_size, seed)
        inputs = _inputs(placed.spec, batch, rng, embed.hidden_size, draw)
        call = _call(block, placed.outer, inputs)
        if setup.options.check:
            _check(setup, built, call)
        yield Contender(
            backend=str(setup.plan),
            precision=setup.precision_of(placed),
            test=f"{kind} {n}x{seq_len}",
            samples=n,
            tokens=n * seq_len,
            work=placed.spec.work(batch, itemsize(setup, placed)),
            call=call,
        )


def _check(setup: Setup, built: Sequence[Checked], call: Callable[[], object]) -> None:
    with inspected(built, setup.checkpoint.values) as faults:
        call()
    if faults:
        raise Lfm2kitError(faults[0])


def _call(block: Callable[..., Any], outer: Memory, inputs: Sequence[Any]) -> Callable[[], Result]:
    """Return a call of a block with host arrays, and with a batch that is where it is wanted."""
    there = [one.on(outer) if isinstance(one, Batch) else one for one in inputs]

    def call() -> Result:
        moved = (outer.from_host(x) if isinstance(x, np.ndarray) else x for x in there)
        result = block(*moved)
        if isinstance(result, tuple):
            return tuple(map(outer.to_host, result))
        return outer.to_host(result)

    return call


def _inputs(
    spec: Any, batch: Batch, rng: np.random.Generator, hidden_size: int, draw: Draw
) -> tuple[Any, ...]:
    """Return the arguments of a block of `spec`, as it gets them in a forward of `batch`."""
    tokens = batch.tokens

    def x(rows: int = tokens, columns: int = hidden_size) -> npt.NDArray[np.float32]:
        return draw(rng, (rows, columns))

    match spec.kind:
        case "embed":
            return (batch,)
        case "norm":
            return x(), x()
        case "conv" | "attn":
            return x(), batch, None
        case "choice":
            return (1 / (1 + np.exp(-x(columns=spec.num_experts))),)
        case "experts":
            return x(), *_routing(spec, tokens, rng)
        case "rows":
            return x(), x(), batch
        case "head":
            return (x(len(batch.logits_rows)),)
        case "layer":
            return x(), x(), batch, None
    return (x(),)


def _routing(spec: Any, rows: int, rng: np.random.Generator) -> tuple[Any, Any]:
    """Return (expert_ids, expert_weights): as many experts at random as a token takes."""
    local = np.array(spec.local_experts, np.int32)
    order = rng.random((rows, len(local))).argsort(axis=1)[:, : spec.num_experts_per_tok]
    return local[order], rng.uniform(0.1, 1, order.shape).astype(np.float32)


def _first(setup: Setup, kind: str) -> Placed:
    """Return the first block of `kind`: joined by the core, built whole, or part of another."""
    there = list(_walk(setup, setup.placed))
    found = [placed for placed in there if placed.spec.kind == kind]
    if not found:
        kinds = {placed.spec.kind for placed in there}
        raise Lfm2kitError(f"the plan builds no block of kind {kind}; {choices(kind, kinds)}")
    whole = (placed for placed in found if not _lacking_in(placed, setup))
    first = next(whole, None)
    if first is None:
        raise _unsupported(setup, _lacking_in(found[0], setup))
    return first


def _lacking_in(placed: Placed, setup: Setup) -> list[Lacking]:
    """Return what a block needs and the plan's backends do not build."""
    names = {leaf.name for leaf in placed.leaves()}
    return [one for one in setup.lacking if one.name in names]


def _unsupported(setup: Setup, lacking: Sequence[Lacking]) -> Lfm2kitError:
    names = setup.plugins.by_preference()
    able = (n for n in names if all(can_build(setup.create, n, one.spec) for one in lacking))
    name = next(able, None)
    advice = () if name is None else ("; try ", Option("backend", name))
    return Lfm2kitError(in_words(lacking), *advice)


def _walk(setup: Setup, placed: Placed) -> Iterator[Placed]:
    """Yield `placed` and its parts, also those that a block built whole could be built of."""
    yield placed
    for _, part in placed.parts:
        yield from _walk(setup, part)
    if placed.backend is not None:
        yield from _inside(setup, placed, placed.backend)


def _inside(setup: Setup, placed: Placed, backend: str) -> Iterator[Placed]:
    """Yield the parts of a block that its backend builds alone, and theirs."""
    for role, scope, spec, _ in placed.spec.parts():
        name, scope = f"{placed.name}.{role}".strip("."), f"{placed.scope}.{scope}".strip(".")
        part = replace(placed, name=name, scope=scope, spec=spec, parts=())
        asked = Answers(setup.create(backend), backend, name)
        if asked.why_unsupported(spec) is None:
            yield from _walk(setup, replace(part, memory=asked.memory(spec)))
        else:
            yield from _inside(setup, part, backend)
