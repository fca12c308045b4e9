"""The hooks of lfm2kit: all that a plugin can add.  None of them runs during a forward.

A plugin is a module (or object) named by an entry point of the group `lfm2kit`; it implements any
of these functions and marks them with `@lfm2kit.hookimpl`:

    # pyproject.toml
    [project.entry-points.lfm2kit]
    mine = "lfm2kit_mine"
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pluggy

from lfm2kit.backend import BackendPlugin, Block
from lfm2kit.checkpoint.readers import CheckpointReader
from lfm2kit.memory import Memory
from lfm2kit.rewrites import Rewrite
from lfm2kit.specs import Spec
from lfm2kit.transport import Transport, TransportPlugin, World

hookspec = pluggy.HookspecMarker("lfm2kit")
hookimpl = pluggy.HookimplMarker("lfm2kit")


@dataclass(frozen=True, slots=True)
class Wrapper:
    """A plugin's wrapper around a block: `wrap(block)` runs in the block's place.

    A captured forward calls its blocks once, while it is captured, and none of them in a replay.  A
    wrapper that works all the same, because it only enqueues work on the memory's current stream,
    says so; a model with any other wrapper is not captured.
    """

    wrap: Callable[[Block], Block]
    survives_capture: bool = False


@dataclass(frozen=True, slots=True)
class Command:
    """A command `lfm2kit NAME`.

    The parameters of `run` are its arguments and options, as Typer reads them, and the docstring of
    `run` is its help.  What `run` prints should go through `lfm2kit.text.printable`.
    """

    name: str
    run: Callable[..., None]


@hookspec
def lfm2kit_backends() -> Iterable[BackendPlugin]:
    """Announce backends.

    import lfm2kit

    @lfm2kit.hookimpl
    def lfm2kit_backends():
        def create(context):
            from lfm2kit_mine.backend import Mine  # the heavy imports happen here
            return Mine(context)
        yield lfm2kit.BackendPlugin("mine", "what it is in a line", create, api_version=1)
    """
    raise NotImplementedError


@hookspec
def lfm2kit_transports() -> Iterable[TransportPlugin]:
    """Announce transports: what expert parallelism sends its tokens over.

    @lfm2kit.hookimpl
    def lfm2kit_transports():
        yield lfm2kit.TransportPlugin("mpi", "MPI, staged through the host", Launcher())
    """
    raise NotImplementedError


@hookspec
def lfm2kit_checkpoints() -> Iterable[CheckpointReader]:
    """Announce readers of checkpoints in other formats than lfm2kit's own.

    @lfm2kit.hookimpl
    def lfm2kit_checkpoints():
        yield lfm2kit.CheckpointReader("mine", "what it reads in a line", recognises, open_mine)
    """
    raise NotImplementedError


@hookspec
def lfm2kit_rewrites(world: World, transport: Transport | None) -> Iterable[Rewrite]:
    """Announce rewrites: changes to the model before its blocks are placed.

    Called when plugins are loaded, with a world of one rank, and again for every model that is set
    up, with this process's place in its job.  `transport` is None where there is no job, and where
    a rank's share is only planned.  An implementation may leave out arguments that it does not use.

        @lfm2kit.hookimpl
        def lfm2kit_rewrites():
            joins = {MySpec: functools.partial(Join, MyBlock)}
            yield lfm2kit.Rewrite("mine", "what it changes, in a line", apply, joins)
    """
    raise NotImplementedError


@hookspec
def lfm2kit_block_wrapper(name: str, spec: Spec, memory: Memory) -> Wrapper | None:
    """Return a wrapper for the block called `name` (`layers.3.operator`), or None for none.

    For tracing, timing, checking.  Called once per block when a model is set up, also by commands
    that build nothing.  `memory` is where the block takes its arrays and leaves its result.  Those
    of `Experts` may have 16 bits (see `lfm2kit.backend.ReadsRows`).

        @lfm2kit.hookimpl
        def lfm2kit_block_wrapper(name, spec):
            def wrap(block):
                def timed(*inputs):
                    with clock(name):
                        return block(*inputs)
                return timed
            return lfm2kit.Wrapper(wrap) if spec.kind == "moe" else None
    """
    raise NotImplementedError


@hookspec
def lfm2kit_commands() -> Iterable[Command]:
    """Announce commands.  No two plugins can have the same, and none can have one of lfm2kit's.

    @lfm2kit.hookimpl
    def lfm2kit_commands():
        def hello(name: str, times: int = 1) -> None:
            "Greet somebody."
            print("hello", name * times)
        yield lfm2kit.Command("hello", hello)
    """
    raise NotImplementedError


@hookspec
def lfm2kit_run_ended(record: Mapping[str, Any]) -> None:
    """Receive the record of an `lfm2kit run` that has printed and written its result, good or not.

    `record` is what `--json` writes.  Called on rank 0 alone, with a copy for each plugin.  An
    exception loses nothing: it is shown, and changes the exit code of a good run alone.

        from lfm2kit.records import values

        @lfm2kit.hookimpl
        def lfm2kit_run_ended(record):
            print(record["backend"], *values(record, "throughput"))
    """
    raise NotImplementedError


HOOKS: tuple[Callable[..., Any], ...] = (
    lfm2kit_backends,
    lfm2kit_transports,
    lfm2kit_checkpoints,
    lfm2kit_rewrites,
    lfm2kit_block_wrapper,
    lfm2kit_commands,
    lfm2kit_run_ended,
)
