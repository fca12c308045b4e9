"""What is built around parts that are computed elsewhere (the capability `BuildsAround`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lfm2kit.backend import BuildsAround
from lfm2kit.memory import HOST
from lfm2kit.seam import Seam
from lfm2kit.specs import Part, Spec
from lfm2kit.testing.cases import CASES
from lfm2kit.testing.checks.registry import check
from lfm2kit.testing.compare import assert_close
from lfm2kit.testing.guards import GuardedTensors
from lfm2kit.testing.host_block import HostBlock
from lfm2kit.testing.near_ties import GapWatch
from lfm2kit.testing.random_inputs import random_inputs
from lfm2kit.testing.trial import Trial
from lfm2kit.testing.verdicts import CheckFailed, Skipped
from lfm2kit.weights import Weights


@check
def built_around_parts(trial: Trial) -> None:
    """A spec that is built around a part calls the block that it is given, and none of its own.

    The given block has other weights than those beside it, and lives in the host's memory.
    """
    backend = trial.backend
    if not isinstance(backend, BuildsAround):
        raise Skipped("it builds nothing around parts")
    candidates = [(spec, part) for spec in _larger() for part in _parts(spec)]
    found = [(s, p) for s, p in candidates if backend.why_not_around(s, (p.role,)) is None]
    if not found:
        raise Skipped("it builds none of the suite's specs around a part")
    for spec, part in found:
        weights, others = trial.random_weights(spec), trial.random_weights(part.spec)
        given = _Counted(trial.build_reference(part.spec, others))
        memory = backend.memory(spec)
        parts = {part.role: Seam(given, HOST, memory, state_of=given)}
        tensors = GuardedTensors(weights)
        built = backend.build_around(spec, Weights(tensors), parts)
        block = HostBlock(spec, built, memory, tensors)
        mixed = {f"{part.scope}.{name}".strip("."): tensor for name, tensor in others.items()}
        watch = GapWatch(trial.reference)
        reference = trial.build_reference(spec, Weights({**weights, **mixed}), watch)
        for rows in (0, 1, 17):
            inputs = random_inputs(spec, trial.rng, rows)
            watch.gaps.clear()
            want, calls = reference(*inputs), given.calls
            what = f"{spec} around its {part.role} at {rows} rows"
            clear = watch.clear_rows(trial.near_tie)
            # A layer's result has the errors of two blocks, its operator and its feed-forward.
            assert_close(block(*inputs), want, 2 * trial.tolerance, what, clear)
            if given.calls != calls + 1:
                raise CheckFailed(f"{what}: the given block was called {given.calls - calls} times")


class _Counted:
    """A block that counts its calls."""

    def __init__(self, block: HostBlock) -> None:
        self.block = block
        self.calls = 0

    def __call__(self, *inputs: Any) -> Any:
        self.calls += 1
        return self.block(*inputs)


def _larger() -> list[Spec]:
    return [spec for specs in CASES.values() for spec in specs if spec.parts()]


def _parts(spec: Spec) -> Iterator[Part]:
    """Yield the parts of `spec` and theirs, by path of roles and by scope within `spec`."""
    for part in spec.parts():
        yield part
        for inner in _parts(part.spec):
            scope = f"{part.scope}.{inner.scope}".strip(".")
            yield Part(f"{part.role}.{inner.role}", scope, inner.spec)
