"""How many tokens of a forward choose each expert, and how many rows each rank computes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lfm2kit import specs
from lfm2kit.building.load import Load
from lfm2kit.building.loading import Setup, set_up
from lfm2kit.profiling.forwards import Prompt
from lfm2kit.ranks.agreement import on_first
from lfm2kit.ranks.balancing import max_over_mean
from lfm2kit.rewrites import owners_by_layer
from lfm2kit.rewrites.recorded_load import LoadRecorder
from lfm2kit.transport import Owners


class Loads(NamedTuple):
    """What a forward asked of each expert and rank, by layer."""

    experts: Mapping[int, Sequence[int]] = {}  # tokens that chose each
    ranks: Mapping[int, Sequence[int]] = {}  # rows that each computed; {} without other ranks
    owners: Mapping[int, Sequence[int]] = {}  # the rank of rank 0's group that has each expert

    def __bool__(self) -> bool:
        return bool(self.experts)

    @property
    def max_over_mean(self) -> float | None:
        """Return the rows of each layer's busiest rank over those of an average one."""
        return max_over_mean(self.ranks.values())


def expert_loads(setup: Setup, prompt: Prompt) -> Loads:
    """Return the loads on rank 0, and none elsewhere, or for a model without experts.

    The model is built once more, with routers that count, and the forward done once.  Every rank
    calls this.
    """
    if not any(isinstance(leaf, specs.Experts) for leaf in specs.leaves(setup.checkpoint.spec)):
        return Loads()
    recorder = LoadRecorder()
    _record(setup, prompt, recorder)
    load = recorder.load(setup.checkpoint.path.name, setup.checkpoint.spec, setup.transport)
    told = [] if setup.transport is None else on_first(setup.transport, _computing(setup))
    if load is None or told is None:
        return Loads()
    experts = {layer.layer: layer.counts for layer in load.layers}
    if len(told) < 2:
        return Loads(experts)
    return Loads(experts, _rows(load, [json.loads(one) for one in told]), _owners(setup))


def _record(setup: Setup, prompt: Prompt, recorder: LoadRecorder) -> None:
    """Do the forward with a recorder."""
    tokens = max(batch.tokens for batch in (prompt.batch, prompt.before) if batch is not None)
    model = set_up(
        setup.checkpoint,
        setup.options,
        plugins=setup.plugins,
        world=setup.world,
        transport=setup.transport,
        rewrites=[recorder.rewrite()],
        tokens=tokens,
        grouping=setup.grouping,
        through_host=setup.through_host,
    ).build(tokens=tokens)
    state = None if prompt.room is None else model.new_state(prompt.room)
    if prompt.before is not None:
        model.logits(prompt.before, state)
        recorder.clear()
    model.logits(prompt.batch, state)


def _computing(setup: Setup) -> str:
    """Tell which rank of the job computes each expert for this rank's tokens, by layer.

    A rank that is alone in its group has no layers here, because it computes all of them itself.
    """
    group = setup.group
    mine = group.index(setup.world.rank)
    layers = _owners_by_layer(setup)
    return json.dumps(
        {layer: [group[owner] for owner in owners[mine]] for layer, owners in layers.items()}
    )


def _rows(load: Load, computing: Sequence[Mapping[str, Sequence[int]]]) -> dict[int, list[int]]:
    """Return the rows that each rank computed, of what each rank has told with `_computing`.

    They follow from the experts that tokens chose: not every exchange counts what comes.
    """
    rows = {layer.layer: [0] * len(computing) for layer in load.layers}
    for layer in load.layers:
        for rank, counts in enumerate(layer.by_rank):
            owners = computing[rank].get(str(layer.layer), [rank] * len(counts))
            for owner, count in zip(owners, counts, strict=True):
                rows[layer.layer][owner] += count
    return rows


def _owners(setup: Setup) -> dict[int, Sequence[int]]:
    group = setup.group
    layers = _owners_by_layer(setup)
    return {layer: [group[rank] for rank in owners[0]] for layer, owners in layers.items()}


def _owners_by_layer(setup: Setup) -> dict[int, Owners]:
    assert isinstance(setup.placed.spec, specs.Model)
    return owners_by_layer(setup.placed.spec)
