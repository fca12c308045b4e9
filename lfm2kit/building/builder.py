"""Builds placed specs: from weights to ready blocks, and from these to a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from lfm2kit import specs
from lfm2kit.backend import Backend, Block, BuildsAround, Crosses, Crossing, Server
from lfm2kit.building import out_of_memory
from lfm2kit.building.capacity import check_state
from lfm2kit.building.padding import takes_padding
from lfm2kit.building.placement import Placed
from lfm2kit.building.results import Checked, checked
from lfm2kit.building.waits import Waits
from lfm2kit.engine.samplers import sampler_for
from lfm2kit.model import LFM2
from lfm2kit.overlapped import OFF, overlapping
from lfm2kit.progress import longest, step
from lfm2kit.seam import Seam
from lfm2kit.specs import Spec, Work
from lfm2kit.transport import Exchanging, Transport
from lfm2kit.weights import Weights


@dataclass(frozen=True, slots=True)
class Builder:
    """A builder of the blocks of a placed model."""

    weights: Weights
    create: Callable[[str], Backend]
    wrap: Callable[[str, Spec, Block], Block] = lambda name, spec, block: block
    built: Callable[[Placed], None] = lambda placed: None  # called after each leaf: progress
    before: Callable[[Placed], None] = lambda placed: None  # called before each leaf
    may_capture: bool = True  # False: a wrapper works in calls alone
    ranks: int = 1  # ranks that share the host's memory
    # Filled with the servers of crossings, which a model needs around each forward.  None: blocks
    # are called by themselves, and every seam waits.
    servers: list[Server] | None = None
    exchanging: dict[str, Exchanging] = field(default_factory=dict)  # filled with joined blocks
    checked: list[Checked] = field(default_factory=list)  # filled with what backends have built
    waits: list[Waits] = field(default_factory=list)  # filled with where the model may wait
    distribution: Callable[[str], str] = lambda item: ""  # that a plan's item comes from

    def build(self, placed: Placed) -> Any:
        """Return the block of `placed`, ready to be called from the memory around it."""
        blocks = {role: self.build(part) for role, part in placed.parts}
        if placed.backend is None:
            assert placed.join is not None, "what no backend builds is joined"
            block = placed.join.make(placed.spec, **blocks)
            if isinstance(block, Exchanging):
                self.exchanging[placed.name] = block
                self.waits.append(Waits(placed.name, placed.memory, block))
        else:
            self.before(placed)
            weights = self.weights.scope(placed.scope)
            step(f"building {placed.name}", longest(Work(0, 4 * placed.spec.weight_elements())))
            placed.spec.check_values(weights)
            with out_of_memory.building(placed, weights):
                built = _built(self.create(placed.backend), placed.spec, weights, blocks)
            block = checked(placed, built, self.distribution(placed.backend))
            if isinstance(block, Checked):
                self.checked.append(block)
            self.built(placed)
        return self._seamed(placed, block)

    def _seamed(self, placed: Placed, block: Block) -> Block:
        wrapped = self.wrap(placed.name, placed.spec, block)
        if wrapped is block and not placed.is_copied:
            return block
        crossing = self._crossing(placed, wrapped)
        seam = Seam(wrapped, placed.memory, placed.outer, state_of=block, crossing=crossing)
        if placed.is_copied:
            self.waits.append(Waits(placed.name, placed.outer, seam))
        return seam

    def _crossing(self, placed: Placed, block: Block) -> Crossing | None:
        """Return the crossing of a block that is called from another memory, if there is one."""
        if placed.crosser is None or self.servers is None:
            return None
        backend = self.create(placed.crosser)
        assert isinstance(backend, Crosses)
        crossing = backend.crossing(placed.name, placed.spec, block, placed.memory, placed.outer)
        if crossing.server not in self.servers:
            self.servers.append(crossing.server)
        return crossing


def _built(backend: Backend, spec: Spec, weights: Weights, parts: dict[str, Block]) -> Block:
    if not parts:
        return backend.build(spec, weights)
    assert isinstance(backend, BuildsAround)  # or the placement would have no parts here
    return backend.build_around(spec, weights, parts)


def build_model(
    placed: Placed,
    builder: Builder,
    default_backend: str,
    transport: Transport | None = None,
    overlap: str = OFF,
    folder: Path | None = None,
) -> LFM2:
    """Return the model that `placed` describes, with `builder`'s weights, from `folder`.

    The ranks that share out its experts talk over `transport`.  Raise `Lfm2kitError` where
    `overlap` is "on", and not possible.
    """
    assert isinstance(placed.spec, specs.Model)
    servers: list[Server] = []
    builder = replace(builder, servers=servers, exchanging={})
    forward = builder.build(placed)
    return LFM2(
        spec=placed.spec,
        placed=placed,
        forward=forward,
        overlap=overlapping(overlap, transport, builder.exchanging),
        servers=servers,
        exchanges={name: block.exchange for name, block in builder.exchanging.items()},
        offers=placed.offers(),
        home=placed.outer,
        backend=builder.create(default_backend),
        may_capture=builder.may_capture,
        takes_padding=takes_padding(placed, builder.create),
        check_room=partial(check_state, builder.create, placed, builder.ranks),
        folder=folder,
        new_sampler=sampler_for(placed, builder.create),
    )
