"""The hooks of lfm2kit: all that a plugin can add.  They run while a model is built, never later.

A plugin is a module (or object) named by an entry point of the group `lfm2kit`; it implements any
of these functions and marks them with `@lfm2kit.hookimpl`:

    # pyproject.toml
    [project.entry-points.lfm2kit]
    mine = "lfm2kit_mine"
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pluggy

from lfm2kit.backend import BackendPlugin, Block
from lfm2kit.readers import CheckpointReader
from lfm2kit.specs import Spec
from lfm2kit.transport import TransportPlugin

hookspec = pluggy.HookspecMarker("lfm2kit")
hookimpl = pluggy.HookimplMarker("lfm2kit")


@hookspec
def lfm2kit_backends() -> Iterable[BackendPlugin]:
    """Announces backends.

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
    """Announces transports: what expert parallelism sends its tokens over.

    @lfm2kit.hookimpl
    def lfm2kit_transports():
        yield lfm2kit.TransportPlugin("mpi", "MPI, staged through the host", Launcher())
    """
    raise NotImplementedError


@hookspec
def lfm2kit_checkpoints() -> Iterable[CheckpointReader]:
    """Announces readers of checkpoints in other formats than lfm2kit's own.

    @lfm2kit.hookimpl
    def lfm2kit_checkpoints():
        yield lfm2kit.CheckpointReader("mine", "what it reads in a line", recognises, open_mine)
    """
    raise NotImplementedError


@hookspec
def lfm2kit_block_wrapper(name: str, spec: Spec) -> Callable[[Block], Block] | None:
    """A wrapper for the block called `name` (`layers.3.operator`), or None to leave it alone.

    Called once per block when a model is built.  What it returns is called with the block and
    gives what runs in its place: for tracing, timing, checking.

        @lfm2kit.hookimpl
        def lfm2kit_block_wrapper(name, spec):
            def wrap(block):
                def timed(*inputs):
                    with clock(name):
                        return block(*inputs)
                return timed
            return wrap if spec.kind == "moe" else None
    """
    raise NotImplementedError


HOOKS: tuple[Callable[..., Any], ...] = (
    lfm2kit_backends,
    lfm2kit_transports,
    lfm2kit_checkpoints,
    lfm2kit_block_wrapper,
)
