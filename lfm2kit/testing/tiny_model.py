"""A small model of every kind of block, with the backend on trial wherever it has a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from lfm2kit import specs
from lfm2kit.backend import Backend, Block
from lfm2kit.batch import Batch
from lfm2kit.building.builder import Builder, build_model
from lfm2kit.building.inspecting import fault_in_a_forward
from lfm2kit.building.placement import Placed, Placer
from lfm2kit.building.plan import Plan, Rule
from lfm2kit.model import JOINS, LFM2
from lfm2kit.specs import Spec
from lfm2kit.testing.compare import each
from lfm2kit.testing.host_block import why_not_built
from lfm2kit.testing.verdicts import CheckFailed
from lfm2kit.weights import Weights

REFERENCE, ON_TRIAL = "reference", "on trial"


class Recorder:
    """A record of what each block of a model returned, by the block's name, in order."""

    def __init__(self, placed: Placed) -> None:
        self.results: dict[str, tuple[npt.NDArray[Any], ...]] = {}
        self._memory = {p.name: p.memory for p in placed.tree()}

    def wrap(self, name: str, spec: Spec, block: Block) -> Block:
        """Return `block` with its results recorded, for `Builder`."""

        def recorded(*inputs: Any) -> Any:
            result = block(*inputs)
            to_host = self._memory[name].to_host
            self.results[name] = tuple(np.array(to_host(array)) for array in each(result))
            return result

        return recorded


def build_tiny_model(
    spec: specs.Model, weights: Weights, reference: Backend, on_trial: Backend | None
) -> LFM2:
    """Return the model with `on_trial` for all that it builds and the reference for the rest.

    Raise `CheckFailed` if one of its blocks returns something wrong in a forward of its own.
    """
    placed, builder, default = _placed(spec, weights, reference, on_trial)
    model = build_model(placed, builder, default)
    if (fault := fault_in_a_forward(model, builder.checked, weights)) is not None:
        raise CheckFailed(fault)
    return model


def recorded_run(
    spec: specs.Model,
    weights: Weights,
    reference: Backend,
    on_trial: Backend | None,
    batch: Batch,
) -> dict[str, tuple[npt.NDArray[Any], ...]]:
    """Return what every block returned in one forward, by name, in the order of completion."""
    placed, builder, default = _placed(spec, weights, reference, on_trial)
    recorder = Recorder(placed)
    model = build_model(
        placed, Builder(builder.weights, builder.create, wrap=recorder.wrap), default
    )
    with model.running():
        model.forward(batch.on(model.home))
    return recorder.results


def plan_for(spec: specs.Model, on_trial: Backend | None) -> Plan:
    """Return a plan of the trial's backend wherever it can build, else of the reference."""
    if on_trial is None:
        return Plan(REFERENCE)
    if why_not_built(on_trial, spec) is None:
        return Plan(ON_TRIAL)
    outside = (spec.embed_tokens, spec.last_rows, spec.embedding_norm, spec.lm_head)
    kinds = {part.kind for part in outside if on_trial.why_unsupported(part) is None}
    rules = [Rule(ON_TRIAL, kind) for kind in sorted(kinds)]
    for i, layer in enumerate(spec.layers):
        rules += [Rule(ON_TRIAL, kind, range(i, i + 1)) for kind in sorted(_built(on_trial, layer))]
    return Plan(REFERENCE, tuple(rules))


def _built(backend: Backend, spec: Spec) -> set[str]:
    """Return the kinds of plain blocks of `spec` that `backend` builds, alone or in larger ones."""
    if backend.why_unsupported(spec) is None:
        return {leaf.kind for leaf in specs.leaves(spec)}
    return set().union(*(_built(backend, part.spec) for part in spec.parts()))


def _placed(
    spec: specs.Model, weights: Weights, reference: Backend, on_trial: Backend | None
) -> tuple[Placed, Builder, str]:
    backends = {REFERENCE: reference} | ({ON_TRIAL: on_trial} if on_trial else {})
    create: Callable[[str], Backend] = backends.__getitem__
    plan = plan_for(spec, on_trial)
    placed = Placer(plan, create, JOINS, list(backends)).place(spec)
    return placed, Builder(weights, create), plan.default
