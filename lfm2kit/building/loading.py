"""From a checkpoint and a plan to a model that is ready to run, in two steps.

`Setup` resolves everything that needs no weights (`lfm2kit plan` stops there); `Setup.build`
reads, packs and compiles.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from lfm2kit import specs
from lfm2kit.backend import Backend, BackendPlugin, Block, Captures, Context, Explains, Promise
from lfm2kit.building.answers import Answers
from lfm2kit.building.builder import Builder, build_model
from lfm2kit.building.capacity import FEWER_SEQUENCES, NO_ROOM, Sizes
from lfm2kit.building.dividing import choices as choices_of_groups
from lfm2kit.building.fitting import TOKENS, fitted
from lfm2kit.building.inspecting import fault_in_a_forward
from lfm2kit.building.lacking import Lacking
from lfm2kit.building.load import Load, load_of
from lfm2kit.building.options import FREE, Options
from lfm2kit.building.placement import Placed, Placer
from lfm2kit.building.plan import AUTO, HOST_EXPERTS, Plan
from lfm2kit.building.plugins import Plugins, installed_plugins
from lfm2kit.building.results import Checked
from lfm2kit.building.sharing import Sharing
from lfm2kit.building.waits import Waits
from lfm2kit.building.wrappers import Wrappers
from lfm2kit.checkpoint import Checkpoint, open_checkpoint
from lfm2kit.checkpoint.foreign import why_absent
from lfm2kit.checkpoint.hub_cache import find_cached
from lfm2kit.errors import Lfm2kitError, Option, choices, either
from lfm2kit.host_exchange import AUTO as AUTO_EXCHANGE
from lfm2kit.host_exchange import PAST_HOST, THROUGH_HOST
from lfm2kit.memory import HOST
from lfm2kit.model import JOINS, LFM2, can_capture
from lfm2kit.overlapped import AUTO as AUTO_OVERLAP
from lfm2kit.overlapped import ON
from lfm2kit.precisions import Grade, Precision
from lfm2kit.progress import Wrap, telling
from lfm2kit.ranks.balancing import check_replicas, owners_by
from lfm2kit.ranks.groups import EP, Grouping, each_alone, first_fitting
from lfm2kit.ranks.joining import Again, check_alike, fail_together, refuse_copies, settled_alike
from lfm2kit.rewrites import Places, Rewrite, chosen, rewritten
from lfm2kit.rewrites.experts_split import EXPERTS_PER_SLOT, SLOTS, experts_split
from lfm2kit.rewrites.hidden_states import HiddenStates
from lfm2kit.specs import Spec
from lfm2kit.state import Room
from lfm2kit.transport import Transport, World

EMBEDDED = Path(__file__).parents[1] / "models"


def find_model(name: str) -> Path:
    """Return the path that `name` means.

    In this order: a model that comes with lfm2kit, a path, and a model's name on the Hugging Face
    hub if the hub's cache on this machine has it.
    """
    embedded = sorted(p.name for p in EMBEDDED.iterdir() if p.is_dir())
    if name in embedded:  # even where a folder is called so: that is ./NAME
        return EMBEDDED / name
    if os.path.exists(name):  # not Path's: that raises where a name is too long
        return Path(name)
    if not os.path.islink(name) and (cached := find_cached(name)) is not None:
        return cached
    unknown = f"neither a path nor an embedded model; {choices(name, embedded)}"
    raise Lfm2kitError(f"no model '{name}': {why_absent(name) or unknown}")


@dataclass(frozen=True, slots=True)
class Setup:
    """A model with every block's backend settled, and nothing built yet."""

    checkpoint: Checkpoint
    options: Options
    asked: Plan  # the one that the options say, each `auto` replaced by a name
    plan: Plan  # the same, and who computes which part of experts that were split here
    placed: Placed
    plugins: Plugins
    create: Callable[[str], Backend]
    rewrites: tuple[Rewrite, ...]  # in the order in which they were applied
    wrappers: Wrappers
    world: World
    context: Context
    transport: Transport | None
    grouping: Grouping  # the first of `choices` in which this rank's share fits
    among: Transport | None  # the transport of this rank's group, if it has other ranks
    again: Again  # makes the same one in other groups, or with tokens through the host
    sharing: Sharing | None = None  # what is predicted, if experts are split and rates are known
    placing: str | None = None  # a note on the rates by which experts are split, if it is needed
    load: Load | None = None  # by which experts are placed
    # Why tokens travel through the host, where the options would let them travel past it.
    through_host: str | None = None
    choices: tuple[Grouping, ...] = ()  # smaller groups first
    lacking: Sequence[Lacking] = ()  # blocks in `placed` that cannot be built, where some may be

    @property
    def group(self) -> tuple[int, ...]:
        """Return the ranks that share experts with this one, and this one, in the group's order."""
        return self.grouping.of(self.world.rank)

    def notes(self) -> Iterator[str]:
        """Yield the remarks, and notes from the backends of the plan."""
        yield from self.remarks()

    def remarks(self) -> Iterator[str]:
        """Yield what may be unexpected of the checkpoint, the places of experts, and capture."""
        yield from self.checkpoint.remarks
        if self.placing is not None:
            yield self.placing
        if self.grouping.note is not None:
            yield self.grouping.note
        if self.through_host is not None:
            yield f"tokens travel through the host's memory: {self.through_host}"
        for name in sorted(self.plan.backends()):
            backend = self.create(name)
            if isinstance(backend, Explains):
                yield from (f"{name}: {note}" for note in Answers(backend, name).notes())
        yield from self.not_promised()
        default = self.create(self.plan.default)
        if can_capture(default, self.placed):
            yield from self.wrappers.why_not_captured()
        elif isinstance(default, Captures):
            yield from self.placed.objections()

    def not_promised(self) -> Iterator[str]:
        """Yield what the backends of the plan do not promise of a result's bits, and why."""
        for plugin in self._plugins_of_plan():
            for promise, reason in plugin.not_promised.items():
                yield f"{plugin.name} does not promise that {promise.value}: {reason}"

    def why_not(self, promise: Promise) -> Iterator[str]:
        """Yield which backend of the plan does not keep a promise, and why, for each that does."""
        for plugin in self._plugins_of_plan():
            if (reason := promise.why_not(plugin.not_promised)) is not None:
                yield f"{plugin.name} does not promise that {promise.value}: {reason}"

    def _plugins_of_plan(self) -> list[BackendPlugin]:
        names = {item.partition(":")[0] for item in self.plan.backends()}
        return [self.plugins.backend(name) for name in sorted(names)]

    def host_item(self, layer: int) -> str:
        """Return the plan's item for the host's part of a layer's experts, if they are split."""
        return self._with_host_parts([layer]).backend_for(layer, HOST_EXPERTS)

    def _with_host_parts(self, layers: Iterable[int]) -> Plan:
        asked = Option("gpu_memory", self.options.gpu_memory)
        on_host = _on_host(self.checkpoint.spec, asked, self.options, self.plugins, self.create)
        return self.plan.with_host_experts(layers, on_host)

    def split(
        self,
        places: Mapping[int, Places],
        slots: int = SLOTS,
        experts_per_slot: int = EXPERTS_PER_SLOT,
    ) -> Setup:
        """Return the same set-up with the experts of some layers in these places."""
        if not places:
            return self
        rewrites = (*self.rewrites, experts_split(places, slots, experts_per_slot))
        model, joins = rewritten(self.checkpoint.spec, JOINS, rewrites)
        plan = self._with_host_parts(i for i, layer in places.items() if layer.host)
        placed = Placer(plan, self.create, joins, self.plugins.by_preference()).place(model)
        wrappers = Wrappers.of(placed, self.plugins)
        return replace(self, plan=plan, placed=placed, rewrites=rewrites, wrappers=wrappers)

    def build(
        self,
        built: Callable[[Placed], None] = lambda placed: None,
        *,
        tokens: int = 0,
        checked: list[Checked] | None = None,
        waits: list[Waits] | None = None,
    ) -> LFM2:
        """Build the model for forwards of `tokens` tokens; call `built` after each block.

        `checked` is filled with the blocks of backends in it, and `waits` with where it may wait.
        Raise `Lfm2kitError` if a memory is too small, before any of it is allocated, and if a block
        returns something wrong in the forward that `check` asks for.
        """
        assert not self.lacking, "only blocks that somebody builds are built alone"
        self._check_memory(self.placed, tokens)
        builder = self.builder(built)
        with self.checkpoint.files_of("", self.placed.spec).reading_exactly():
            model = build_model(
                self.placed,
                builder,
                self.plan.default,
                self.among,
                self.options.overlap,
                self.checkpoint.folder,
            )
        if self.options.check:
            self._check_results(model, builder.checked)
        if checked is not None:
            checked.extend(builder.checked)
        if waits is not None:
            waits.extend(builder.waits)
        return model

    def _check_results(self, model: LFM2, blocks: Sequence[Checked]) -> None:
        """Raise `Lfm2kitError`, on every rank of a job, if a block returns something wrong."""
        ranks = 1 if self.transport is None else self.transport.world.size
        fault = fault_in_a_forward(model, blocks, self.checkpoint.values, ranks)
        if self.transport is not None:
            fail_together(self.transport, fault)
        elif fault is not None:
            raise Lfm2kitError(fault)

    def build_block(
        self, placed: Placed, *, tokens: int, checked: list[Checked] | None = None
    ) -> Block:
        """Build one block of the model for calls of `tokens` rows; raise as `build` does.

        `checked` is filled with the blocks of backends in it.
        """
        self._check_memory(placed, tokens)
        builder = self.builder()
        block: Block = builder.build(placed)
        if checked is not None:
            checked.extend(builder.checked)
        return block

    def precision_of(self, placed: Placed) -> str:
        """Return the precisions in which `placed` computes: "fp32", or "bf16 and fp32"."""
        names = (precision.name for precision in self._precisions(placed))
        return " and ".join(dict.fromkeys(names))

    @property
    def grade(self) -> Grade:
        """Return the coarsest grade of the precisions in use, by which the logits are judged."""
        grades = (precision.grade for precision in self._precisions(self.placed))
        return max(grades, key=attrgetter("coarseness"))

    def _precisions(self, placed: Placed) -> Iterator[Precision]:
        items = dict.fromkeys(leaf.backend for leaf in placed.leaves() if leaf.backend is not None)
        return (self.plugins.precision(item, self.context.precision) for item in items)

    @property
    def sizes(self) -> Sizes:
        limit = self.options.gpu_bytes()
        return Sizes(self.create, self.checkpoint.weights, self.context.local_ranks, limit)

    def shortage(self, tokens: int = 0, room: Room = NO_ROOM) -> Lfm2kitError | None:
        """Return an error that says which memory is too small, and what would fit; else None."""
        return self._shortage(self.placed, tokens, room)

    def fits(self, tokens: int) -> bool:
        """Return whether the model, with `tokens` tokens at once, fits into its memories."""
        return self.sizes.shortage(self.placed, tokens) is None

    def _check_memory(self, placed: Placed, tokens: int) -> None:
        if (shortage := self._shortage(placed, tokens)) is not None:
            raise shortage
        if self.transport is not None:  # no rank allocates before all on its machine have looked
            self.transport.barrier()

    def _shortage(self, placed: Placed, tokens: int, room: Room = NO_ROOM) -> Lfm2kitError | None:
        short = self.sizes.shortage(placed, tokens, room)
        if short is None:
            return None
        if tokens and self.sizes.shortage(placed, 0, room) is None:
            advice = "try fewer tokens at once: a smaller batch, or shorter samples"
            return Lfm2kitError(f"{short}; {advice}")
        if room.pages and self.sizes.shortage(placed) is None:
            return Lfm2kitError(f"{short}; {FEWER_SEQUENCES}")
        nothing = ["a smaller model: no ", *either([Option("precision"), Option("n_cpu_moe")])]
        fitting = either(self._fitting(short.memory))
        return Lfm2kitError(f"{short}; try ", *(fitting or [*nothing, " is enough"]))

    def _fitting(self, memory: str) -> Iterator[Option]:
        """Yield options with which this setup would fit: a precision, fewer experts on a device.

        Experts on the CPU take the host's memory instead.
        """
        for precision in self.plugins.backend(self.plan.default).precisions:
            if self._fits(precision=precision.name):
                yield Option("precision", precision.name)
                break
        for count in reversed(range(self.options.streamed_experts or 0)):
            if self._fits(streamed_experts=count):
                yield Option("streamed_experts", count)
                break
        for count in reversed(range(self.options.replicate_experts)):
            if self._fits(replicate_experts=count):
                yield Option("replicate_experts", count)
                break
        if memory == HOST.name:
            return
        if self.options.gpu_memory != FREE and self._fits(gpu_memory=FREE):
            yield Option("gpu_memory", FREE)
        for count in range(1, 1 + len(self.checkpoint.spec.layers)):
            if self._fits(n_cpu_moe=count):
                yield Option("n_cpu_moe", count)
                break

    def _fits(self, **changes: Any) -> bool:
        """Return whether the same model would fit with other options."""
        try:
            other = set_up(
                self.checkpoint,
                replace(self.options, **changes),
                world=self.world,
                transport=self.transport,
                plugins=self.plugins,
                through_host=self.through_host,
            )
        except Lfm2kitError:  # no such precision in a backend of the plan, or no such layer
            return False
        return other.fits(tokens=0)

    def builder(self, built: Callable[[Placed], None] = lambda placed: None) -> Builder:
        """Return a builder for the blocks of `placed`, or of a part of it."""

        def check(placed: Placed) -> None:
            self.checkpoint.files_of(placed.scope, placed.spec).check_unchanged()

        def before(placed: Placed) -> None:
            check(placed)
            self.checkpoint.prefetch(placed.scope, placed.spec)

        def done(placed: Placed) -> None:
            check(placed)
            self.checkpoint.release(placed.scope, placed.spec)
            built(placed)

        wrap: Wrap = self.wrappers.wrap
        if self.transport is not None:
            wrap = telling(wrap, {leaf.name for leaf in self.placed.leaves()})
        return Builder(
            self.checkpoint.values,
            self.create,
            wrap,
            done,
            before,
            self.wrappers.survive_capture,
            self.context.local_ranks,
            distribution=self.plugins.distribution,
        )

    def stored_bytes(self, placed: Placed) -> int:
        """Return the bytes that the weights of `placed` take in the checkpoint.

        Those of parts that a block is built around count as theirs alone.
        """
        tensors = self.checkpoint.tensors_of(placed.scope, placed.spec)
        around = placed.parts if placed.backend is not None else ()
        return sum(t.nbytes for t in tensors) - sum(self.stored_bytes(part) for _, part in around)


def set_up(
    checkpoint: Checkpoint,
    options: Options,
    *,
    world: World | None = None,
    transport: Transport | None = None,
    plugins: Plugins | None = None,
    rewrites: Sequence[Rewrite] = (),
    tokens: int | None = None,
    grouping: Grouping | None = None,
    through_host: str | None = None,
    may_lack: bool = False,
) -> Setup:
    """Place every block; raise `Lfm2kitError` if the plan, a backend or the machine forbids it.

    In a job, experts are shared out inside the groups of `grouping`; without it, inside those that
    the options ask for and in which this rank's share fits.  `rewrites` are applied after those
    that the options name.  If the options limit a device's memory, experts that do not fit are
    placed elsewhere.

    Forwards will have up to `tokens` tokens on this rank, 2048 if that is not known.  Only if it is
    may the ranks of a machine each hold all experts by themselves (`building.dividing`).

    With a `transport` the model is this rank's share.  A `world` alone gives the share of that
    rank, to be planned but not built.  Tokens travel through the host if `through_host` says why.
    If blocks `may_lack`, for whoever builds some of them alone, `Setup.lacking` names those that
    the plan gives to backends that do not build them.
    """
    options.check_limited("rates")
    plugins = plugins or installed_plugins()
    world = world or (transport.world if transport is not None else World())
    most = TOKENS if tokens is None else tokens
    load = load_of(options.load, checkpoint.spec)
    if load is not None:
        check_replicas(options.replicate_experts, load)

    @cache
    def within(grouping: Grouping) -> Setup:
        return _set_up(
            checkpoint,
            options,
            world,
            transport,
            grouping,
            plugins,
            rewrites,
            most,
            load,
            through_host,
            may_lack and options.gpu_memory is None,  # a split needs the sizes of all blocks
        )

    def placed_alone() -> Placed:
        return within(each_alone(world)).placed

    asked = (
        [grouping]
        if grouping is not None
        else choices_of_groups(options, checkpoint.spec, world, transport, tokens, placed_alone)
    )
    found = within(first_fitting(asked, lambda one: within(one).fits(most)))
    _check_load_is_used(options, found.grouping)
    return replace(found, choices=tuple(asked))


def _check_load_is_used(options: Options, grouping: Grouping) -> None:
    """Raise `Lfm2kitError` if a load is given, but leaves no choice of places for experts."""
    is_shared = any(len(group) > 1 for group in grouping.groups)
    if options.load is None or is_shared:
        return
    if options.replicate_experts:
        asked = Option("replicate_experts", options.replicate_experts)
    elif options.gpu_memory is None:
        asked = Option("load", options.load)
    else:
        return
    if (ranks := len(grouping.groups)) > 1:
        other = Option("parallel", EP) if options.ep_size is None else Option("ep_size", ranks)
        raise Lfm2kitError(asked, ": each rank holds all experts; try ", other)
    if options.replicate_experts:
        raise Lfm2kitError(asked, ": there is only one rank; start more")
    limit = Option("gpu_memory", "24GiB")
    raise Lfm2kitError(asked, ": needs ranks that share experts, or a limit, such as ", limit)


def _set_up(
    checkpoint: Checkpoint,
    options: Options,
    world: World,
    transport: Transport | None,
    grouping: Grouping,
    plugins: Plugins,
    rewrites: Sequence[Rewrite],
    tokens: int,
    load: Load | None,
    through_host: str | None,
    may_lack: bool,
) -> Setup:
    """Place every block, with the experts of each layer shared out inside the given groups."""
    context = Context(options.precision, options.threads, world.local_size, world.local_rank)
    create = plugins.creator(context)
    plan = _resolve_auto(options.chosen_plan(), plugins, context)
    plan = _with_host_experts(plan, options, checkpoint.spec, plugins, create)
    for name in sorted(plan.backends()):
        plugins.backend(name)  # a bad name is an error even where its rule would fit nothing
    place, among = grouping.place(world, transport)
    if place.size == 1:
        _check_something_travels(options, world)
    by_load = None if load is None else owners_by(load, place.size, options.replicate_experts)
    exchange = options.exchange if through_host is None else THROUGH_HOST
    there = plugins.rewrites(place, among, by_load, exchange)
    applied = (*chosen(options.rewrites, there, plugins.skipped()), *rewrites)
    model, joins = rewritten(checkpoint.spec, JOINS, applied)
    of_whole = plan if options.gpu_memory is None else plan.for_whole_experts()
    placer = Placer(of_whole, create, joins, plugins.by_preference())
    placed, lacking = placer.placed_and_lacking(model) if may_lack else (placer.place(model), ())
    wrappers = Wrappers.of(placed, plugins)
    whole = Setup(
        checkpoint,
        options,
        plan,
        plan,
        placed,
        plugins,
        create,
        applied,
        wrappers,
        world,
        context,
        transport,
        grouping,
        among,
        partial(
            set_up,
            checkpoint,
            options,
            world=world,
            transport=transport,
            plugins=plugins,
            rewrites=rewrites,
            tokens=tokens,
        ),
        load=load,
        through_host=through_host,
        lacking=lacking,
    )
    return whole if options.gpu_memory is None else fitted(whole, tokens)


def _check_something_travels(options: Options, world: World) -> None:
    """Raise `Lfm2kitError` if the options ask for something of an exchange that there is not."""
    for name, value, auto in (
        ("overlap", ON, AUTO_OVERLAP),
        ("exchange", PAST_HOST, AUTO_EXCHANGE),
    ):
        if getattr(options, name) != value:
            continue
        asked, otherwise = Option(name, value), Option(name, auto)
        if world.size == 1:
            raise Lfm2kitError(asked, ": there is only one rank; start more, or try ", otherwise)
        either_of = Option("parallel", EP), " or ", otherwise
        raise Lfm2kitError(asked, ": each rank holds all experts; try ", *either_of)


def load_model(
    model: str | Path,
    backend: str | None = None,
    *,
    job: Transport | None = None,
    independent: bool = False,
    hidden_states: HiddenStates | None = None,
    **options: Any,
) -> LFM2:
    """Return the model at a path (or an embedded model's name), its blocks from a plan.

    model = load_model("tiny", "reference,2-4.moe=cpu_simd", threads=4)
    logits = model.logits(Batch.of_sequences([[1, 2, 3], [4, 5]]))

    Without a `backend` and a `plan` (the path of a TOML file) every block is `auto`'s.
    `options` are other fields of `lfm2kit.building.options.Options`.

    A rank of a job gives the `job` of `lfm2kit.joined_job`, and gets its share of the model.  All
    ranks then make the same number of forwards, perhaps of no sequences.  One of several processes
    that does not give its job is refused, unless each is meant to be `independent`.

    `hidden_states` get what comes out of the layers that they name, in every forward.

    Raise `Lfm2kitError` for anything that the user must change.  Warn, once in a job, about
    doubtful checkpoints, such as two sets of weights in one folder, about experts that are placed
    in another way than might be expected, and about forwards that are not captured.
    """
    if job is not None and not isinstance(getattr(job, "world", None), World):
        raise Lfm2kitError(
            f"job={job!r}: expected a job, such as that of `with lfm2kit.joined_job() as job`"
        )
    if job is not None and independent:
        said = ": a rank of a job has its share of the model, and an independent process all of it"
        raise Lfm2kitError(
            "job and ", Option("independent", True), f"{said}; give only one of them"
        )
    if job is None and not independent:
        refuse_copies()
    plugins = installed_plugins()
    _check_names(options, plugins)
    name = os.fspath(model) if isinstance(model, os.PathLike) else model
    asked = Options(model=name, backend=backend, **options)
    readers = plugins.readers.values()
    checkpoint = open_checkpoint(find_model(asked.model), readers, seed=asked.seed or 0)
    transport = job if job is not None and job.world.size > 1 else None
    watching = [] if hidden_states is None else [hidden_states.rewrite()]
    setup = set_up(checkpoint, asked, transport=transport, plugins=plugins, rewrites=watching)
    if transport is not None:
        check_alike(transport, setup)
        setup = settled_alike(transport, setup)
    if transport is None or transport.world.rank == 0:
        for remark in setup.remarks():
            warnings.warn(remark, stacklevel=2)
    loaded = setup.build()
    if hidden_states is not None:
        hidden_states.clear()  # of what `check` has run
    return loaded


def _check_names(options: Iterable[str], plugins: Plugins) -> None:
    """Raise `Lfm2kitError` for a name that no option of `load_model` has."""
    there = [one.name for one in fields(Options) if one.name != "model"]
    for name in options:
        if name in plugins.rewrites():
            raise Lfm2kitError(f"'{name}' is a rewrite; type rewrites=('{name}',)")
        if name not in there:
            raise Lfm2kitError(f"unknown option '{name}'; {choices(name, there)}")


def _resolve_auto(plan: Plan, plugins: Plugins, context: Context) -> Plan:
    """Return the plan with the name of a backend wherever it says `auto`."""

    def resolved(item: str) -> str:
        name, colon, precision = item.partition(":")
        best = plugins.auto(precision or context.precision) if name == AUTO else name
        return f"{best}{colon}{precision}"

    rules = tuple(replace(rule, backend=resolved(rule.backend)) for rule in plan.rules)
    return Plan(resolved(plan.default), rules)


def _with_host_experts(
    plan: Plan,
    options: Options,
    model: specs.Model,
    plugins: Plugins,
    create: Callable[[str], Backend],
) -> Plan:
    """Return the plan with the experts of the first layers in the host's memory, as asked.

    They keep the precision that the plan gives them: `NAME:bf16` asks for BF16 wherever they are.
    """
    if not options.n_cpu_moe:
        return plan
    on_host = _on_host(model, Option("n_cpu_moe", options.n_cpu_moe), options, plugins, create)
    return plan.with_cpu_experts(options.n_cpu_moe, model, on_host)


def _on_host(
    model: specs.Model,
    asked: Option,
    options: Options,
    plugins: Plugins,
    create: Callable[[str], Backend],
) -> Callable[[str], str]:
    """Return a function that takes a plan's item for experts, and returns one on the host.

    It raises `Lfm2kitError`, which names the option `asked`, if no backend builds them there.
    """
    experts = [leaf for leaf in specs.leaves(model) if isinstance(leaf, specs.Experts)]

    def on_host(item: str) -> str:
        there = in_host_memory(item, experts[0], options, plugins, create)
        if there is None:
            precision = item.partition(":")[2] or options.precision
            where = f"builds Experts in {precision} in the host's memory"
            raise Lfm2kitError(asked, f": no backend that can run here {where}")
        return there

    return on_host


def in_host_memory(
    item: str,
    spec: Spec,
    options: Options,
    plugins: Plugins,
    create: Callable[[str], Backend],
) -> str | None:
    """Return a plan's item that builds `spec` in the host's memory, in the precision of `item`.

    It names the most preferred backend that does; without one it is None.
    """
    _, colon, own = item.partition(":")
    for name in plugins.ready(own or options.precision):
        there = f"{name}{colon}{own}"
        asked = Answers(create(there), there)
        if asked.why_unsupported(spec) is None and asked.memory(spec).name == HOST.name:
            return there
    return None
