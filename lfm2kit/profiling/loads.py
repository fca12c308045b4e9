"""How many tokens of a forward choose each expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lfm2kit import specs
from lfm2kit.building.loading import set_up
from lfm2kit.building.options import Options
from lfm2kit.checkpoint import Checkpoint
from lfm2kit.profiling.forwards import Prompt
from lfm2kit.rewrites.recorded_load import LoadRecorder


def expert_loads(
    checkpoint: Checkpoint, options: Options, prompt: Prompt
) -> Mapping[int, Sequence[int]]:
    """Return the tokens by layer and expert; nothing for a model without experts.

    The model is built once more, with routers that count, and the forward done once.
    """
    if not any(isinstance(leaf, specs.Experts) for leaf in specs.leaves(checkpoint.spec)):
        return {}
    recorder = LoadRecorder()
    tokens = max(batch.tokens for batch in (prompt.batch, prompt.before) if batch is not None)
    model = set_up(checkpoint, options, rewrites=[recorder.rewrite()], tokens=tokens).build(
        tokens=tokens
    )
    state = None if prompt.room is None else model.new_state(prompt.room)
    if prompt.before is not None:
        model.logits(prompt.before, state)
        recorder.clear()
    model.logits(prompt.batch, state)
    load = recorder.load(checkpoint.path.name, checkpoint.spec, None)
    assert load is not None, "there are no other ranks"
    return {layer.layer: layer.counts for layer in load.layers}
