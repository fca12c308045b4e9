"""How many tokens of a forward choose each expert, and how many rows each rank computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lfm2kit import specs
from lfm2kit.building.load import Load
from lfm2kit.building.loading import Setup, set_up
from lfm2kit.measuring import exchanged
from lfm2kit.measuring.exchanged import Exchanged
from lfm2kit.profiling.forwards import Prompt
from lfm2kit.ranks.balancing import max_over_mean
from lfm2kit.rewrites import owners_by_layer
from lfm2kit.rewrites.recorded_load import LoadRecorder
from lfm2kit.transport import Sent


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
    told = _counted(setup, prompt, recorder)
    load = recorder.load(setup.checkpoint.path.name, setup.checkpoint.spec, setup.transport)
    if load is None:
        return Loads()
    experts = {layer.layer: layer.counts for layer in load.layers}
    if setup.transport is None:
        return Loads(experts)
    return Loads(experts, _rows(load, told), _owners(setup))


def _counted(setup: Setup, prompt: Prompt, recorder: LoadRecorder) -> Exchanged | None:
    """Do the forward with a recorder, and return what the ranks exchanged."""
    tokens = max(batch.tokens for batch in (prompt.batch, prompt.before) if batch is not None)
    model = set_up(
        setup.checkpoint,
        setup.options,
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
    exchanged.begin(model)
    model.logits(prompt.batch, state)
    if setup.transport is None:
        return None
    return exchanged.ended(model, setup.transport, Sent(), setup.grouping.groups)


def _rows(load: Load, told: Exchanged | None) -> dict[int, Sequence[int]]:
    """Return the rows of each rank: those that came, or those of its own tokens if none travel."""
    rows = {layer.layer: [sum(counts) for counts in layer.by_rank] for layer in load.layers}
    layers = [] if told is None else told.document(1.0)["layers"]
    return rows | {int(one["layer"].split(".")[1]): one["rows_by_rank"] for one in layers}


def _owners(setup: Setup) -> dict[int, Sequence[int]]:
    assert isinstance(setup.placed.spec, specs.Model)
    group, owners = setup.group, owners_by_layer(setup.placed.spec)
    return {layer: [group[rank] for rank in one[0]] for layer, one in owners.items()}
