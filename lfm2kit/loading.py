"""From a checkpoint and a plan to a model that is ready to run, in two steps.

`Setup` resolves everything that needs no weights (`lfm2kit plan` stops there); `Setup.build`
reads, packs and compiles.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from lfm2kit import specs
from lfm2kit.backend import Backend, Block, Context, Explains
from lfm2kit.capacity import Sizes
from lfm2kit.checkpoint import Checkpoint, open_checkpoint
from lfm2kit.checkpoint.foreign import why_absent
from lfm2kit.errors import Lfm2kitError, choices
from lfm2kit.memory import HOST
from lfm2kit.model import JOINS, LFM2, Builder, build_model
from lfm2kit.parallel import ExpertParallelMoe, join, shard
from lfm2kit.placement import Join, Joins, Placed, Placer
from lfm2kit.plan import Plan
from lfm2kit.plugins import Plugins, installed_plugins
from lfm2kit.precisions import Grade
from lfm2kit.progress import Wrap, telling
from lfm2kit.transport import Transport
from lfm2kit.trim import trim as trimmed

EMBEDDED = Path(__file__).parent / "models"
AUTO = "auto"


def find_model(name: str) -> Path:
    """The path that `--model` means: the name of a model that comes with lfm2kit, or a path."""
    embedded = sorted(p.name for p in EMBEDDED.iterdir() if p.is_dir())
    if name in embedded:  # even where a folder is called so: that is ./NAME
        return EMBEDDED / name
    if os.path.exists(name):  # not Path's: that raises where a name is too long
        return Path(name)
    unknown = f"neither a path nor an embedded model; {choices(name, embedded)}"
    raise Lfm2kitError(f"no model '{name}': {why_absent(name) or unknown}")


@dataclass(frozen=True, slots=True)
class Setup:
    """A model with every block's backend settled, and nothing built yet."""

    checkpoint: Checkpoint
    plan: Plan
    placed: Placed
    plugins: Plugins
    create: Callable[[str], Backend]
    joins: Joins
    context: Context
    transport: Transport | None
    again: Callable[..., Setup]  # the same, but for the options of `set_up` that it is given

    def notes(self) -> Iterator[str]:
        """Yields remarks on the checkpoint, and notes from the backends of the plan."""
        yield from self.checkpoint.remarks
        for name in sorted(self.plan.backends()):
            backend = self.create(name)
            if isinstance(backend, Explains):
                yield from (f"{name}: {note}" for note in backend.notes())

    def build(
        self, built: Callable[[Placed], None] = lambda placed: None, *, tokens: int = 0
    ) -> LFM2:
        """Builds the model for forwards of `tokens` tokens; calls `built` after each block.

        Raises `Lfm2kitError` if a memory is too small, before any of it is allocated.
        """
        self._check_memory(self.placed, tokens)
        return build_model(self.placed, self.builder(built), self.plan.default)

    def build_block(self, placed: Placed, *, tokens: int) -> Block:
        """Builds one block of the model for calls of `tokens` rows; raises as `build` does."""
        self._check_memory(placed, tokens)
        block: Block = self.builder().build(placed)
        return block

    @property
    def grade(self) -> Grade:
        """The coarsest grade of the precisions in use: what the logits are judged by."""
        items = {leaf.backend for leaf in self.placed.leaves() if leaf.backend is not None}
        precisions = (self.plugins.precision(item, self.context.precision) for item in items)
        return max((p.grade for p in precisions), key=lambda grade: grade.block_error)

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.create, self.checkpoint.weights, self.context.local_ranks)

    def shortage(self, tokens: int = 0) -> str | None:
        """Says which memory is too small, by how much, and what would fit; None if none is."""
        return self._shortage(self.placed, tokens)

    def _check_memory(self, placed: Placed, tokens: int) -> None:
        if (sentence := self._shortage(placed, tokens)) is not None:
            raise Lfm2kitError(sentence)
        if self.transport is not None:  # no rank allocates before all on its machine have looked
            self.transport.barrier()

    def _shortage(self, placed: Placed, tokens: int) -> str | None:
        short = self.sizes.shortage(placed, tokens)
        if short is None:
            return None
        if tokens and self.sizes.shortage(placed) is None:
            return f"{short}; try fewer tokens at once: a smaller batch, or shorter samples"
        nothing = "a smaller model: no --precision or --n-cpu-moe is enough"
        return f"{short}; try {' or '.join(self._fitting(short.memory)) or nothing}"

    def _fitting(self, memory: str) -> Iterator[str]:
        """Yields options with which this setup would fit: a precision, the fewest CPU layers.

        Experts on the CPU take the host's memory instead.
        """
        for precision in self.plugins.backend(self.plan.default).precisions:
            if self._fits(context=replace(self.context, precision=precision.name)):
                yield f"--precision {precision.name}"
                break
        most = 0 if memory == HOST.name else len(self.checkpoint.spec.layers)
        for count in range(1, 1 + most):
            if self._fits(n_cpu_moe=count):
                yield f"--n-cpu-moe {count}"
                break

    def _fits(self, **changes: object) -> bool:
        try:
            other = self.again(**changes)
        except Lfm2kitError:  # no such precision in a backend of the plan, or no such layer
            return False
        return other.sizes.shortage(other.placed) is None

    def builder(self, built: Callable[[Placed], None] = lambda placed: None) -> Builder:
        """Returns a builder for the blocks of `placed`, or of a part of it."""

        def check(placed: Placed) -> None:
            self.checkpoint.files_of(placed.scope, placed.spec).check_unchanged()

        def done(placed: Placed) -> None:
            check(placed)
            self.checkpoint.release(placed.scope, placed.spec)
            built(placed)

        wrap: Wrap = self.plugins.wrap
        if self.transport is not None:
            wrap = telling(wrap, {leaf.name for leaf in self.placed.leaves()})
        return Builder(self.checkpoint.weights, self.create, self.joins, wrap, done, check)

    def stored_bytes(self, placed: Placed) -> int:
        """Returns the bytes that the weights of `placed` take in the checkpoint."""
        return sum(t.nbytes for t in self.checkpoint.tensors_of(placed.scope, placed.spec))


def set_up(
    checkpoint: Checkpoint,
    plan: Plan,
    *,
    context: Context | None = None,
    n_cpu_moe: int = 0,
    trim: bool = False,
    transport: Transport | None = None,
    plugins: Plugins | None = None,
) -> Setup:
    """Places every block; `Lfm2kitError` where the plan, the backends or the machine forbid it.

    `n_cpu_moe` is the number of first MoE layers whose experts go to the CPU; `trim` leaves out
    rows that no logit depends on (see `lfm2kit.trim`); with a `transport` of several ranks, each
    holds its share of every layer's experts.
    """
    plugins = plugins or installed_plugins()
    context = context or Context()
    plan = _resolve_auto(plan, plugins, context)
    again = partial(
        set_up, checkpoint, plan, context=context, n_cpu_moe=n_cpu_moe, trim=trim,
        transport=transport, plugins=plugins,
    )  # fmt: skip
    if n_cpu_moe:
        plan = plan.with_cpu_experts(n_cpu_moe, checkpoint.spec, "cpu_simd")
    for name in sorted(plan.backends()):
        plugins.backend(name)  # a bad name is an error even where its rule would fit nothing
    create = plugins.creator(context)
    model: specs.Model = checkpoint.spec
    joins: Joins = JOINS
    if transport is not None:
        model = shard(model, transport.world)
        joins = {**JOINS, ExpertParallelMoe: Join(join(transport), HOST)}
    placer = Placer(plan, create, joins, plugins.backends)
    placed = placer.place(trimmed(model) if trim else model)
    return Setup(checkpoint, plan, placed, plugins, create, joins, context, transport, again)


def load_model(path: str | Path, backend: str = AUTO, *, threads: int | None = None) -> LFM2:
    """The model at `path` (or an embedded model's name), its blocks from the plan `backend`.

    model = load_model("tiny", "cpu_simd,attn=reference")
    logits = model.logits(Batch.of_sequences([[1, 2, 3], [4, 5]]))

    Warns about doubtful checkpoints, such as two sets of weights in one folder.
    """
    plugins = installed_plugins()
    checkpoint = open_checkpoint(find_model(str(path)), plugins.readers.values())
    for remark in checkpoint.remarks:
        warnings.warn(remark, stacklevel=2)
    context = Context(threads=threads)
    return set_up(checkpoint, Plan.parse(backend), context=context, plugins=plugins).build()


def _resolve_auto(plan: Plan, plugins: Plugins, context: Context) -> Plan:
    """`auto` spelt out, wherever the plan says it."""

    def resolved(item: str) -> str:
        name, colon, precision = item.partition(":")
        best = plugins.auto(precision or context.precision) if name == AUTO else name
        return f"{best}{colon}{precision}"

    rules = tuple(replace(rule, backend=resolved(rule.backend)) for rule in plan.rules)
    return Plan(resolved(plan.default), rules)
