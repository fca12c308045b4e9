"""What the contract says of every block beyond its values: memory, arguments, results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lfm2kit import specs
from lfm2kit.backend import Adds, Bounded, MemoryFigures
from lfm2kit.checkpoint.config import LFM2_8B_A1B, model_spec
from lfm2kit.specs import Spec
from lfm2kit.testing.cases import CASES
from lfm2kit.testing.checks.registry import check
from lfm2kit.testing.compare import HostArray, Result, assert_same, each
from lfm2kit.testing.guards import arrays_of_arguments
from lfm2kit.testing.random_inputs import random_inputs
from lfm2kit.testing.sessions import calls
from lfm2kit.testing.trial import Trial
from lfm2kit.testing.verdicts import CheckFailed, Skipped


@dataclass(frozen=True, slots=True)
class _Unheard(Spec):
    """A spec that no backend knows."""

    kind = "unheard"

    def parameters(self) -> dict[str, specs.Shape]:
        return {}


@check
def unknown_spec_is_refused(trial: Trial) -> None:
    """`why_unsupported` gives a reason for a spec it has never heard of, and does not raise.

    The core asks for the largest spec first, some of them a plugin's own.
    """
    reason = trial.backend.why_unsupported(_Unheard())
    if not isinstance(reason, str) or not reason:
        raise CheckFailed(f"why_unsupported returned {reason!r} for a spec that nobody builds")


@check
def every_kind_built_is_judged(trial: Trial) -> None:
    """The suite judges a block of each kind that the backend builds for LFM2-8B-A1B.

    A backend whose kernels take the release's sizes alone would pass, with its checks skipped.
    """
    release = model_spec(LFM2_8B_A1B, tied=True)
    unjudged = {
        spec.kind: spec
        for spec in dict.fromkeys(_tree(release))
        if spec.kind in CASES and trial.built([spec]) and not trial.takes_any(CASES[spec.kind])
    }
    if unjudged:
        first = next(iter(unjudged.values()))
        raise CheckFailed(
            f"no check judges {', '.join(unjudged)}: it builds {first}, "
            f"but no {first.kind} of a small or of a usual width"
        )


@check
def memory_round_trip(trial: Trial) -> None:
    """`from_host` and then `to_host` gives the same values, type and shape, empty arrays too."""
    for spec in trial.first_of_kinds():
        if trial.is_joined(spec):
            continue
        memory = trial.backend.memory(spec)
        for dtype in (np.int32, np.float32):
            for shape in ((5,), (3, 7), (0, 7), (0,)):
                array = (100 * trial.rng.standard_normal(shape)).astype(dtype)
                back = memory.to_host(memory.from_host(array.copy()))
                what = f"memory {memory.name!r} of {spec}, {dtype.__name__} {shape}"
                assert_same(back, array, what)
                if back.dtype != dtype:
                    raise CheckFailed(f"{what}: came back as {back.dtype}")


@check
def memory_adds(trial: Trial) -> None:
    """A memory's `add` gives the sum of two arrays as a new one, and leaves both as they are."""
    built = [spec for spec in trial.first_of_kinds() if not trial.is_joined(spec)]
    for spec in {trial.backend.memory(spec).name: spec for spec in built}.values():
        memory = trial.backend.memory(spec)
        if not isinstance(memory, Adds):
            raise Skipped("its memory has no `add`")
        for shape in ((17, 24), (1, 33), (300, 2048), (0, 24)):
            arrays = [trial.rng.standard_normal(shape).astype(np.float32) for _ in range(2)]
            there = [memory.from_host(array.copy()) for array in arrays]
            total = memory.to_host(memory.add(*there))
            what = f"memory {memory.name!r} of {spec}, {list(shape)}"
            assert_same(total, arrays[0] + arrays[1], f"{what}: the sum")
            for array, was in zip(there, arrays, strict=True):
                assert_same(memory.to_host(array), was, f"{what}: an array that was added")


@check
def sizes_are_known_before_building(trial: Trial) -> None:
    """`kept_bytes`, `scratch_bytes` and a memory's `free_bytes` are whole numbers from 0 on.

    A run is refused where blocks need more than is free.
    """
    for spec in trial.first_of_kinds():
        if trial.is_joined(spec):
            continue
        memory, backend = trial.backend.memory(spec), trial.backend
        if isinstance(backend, MemoryFigures):
            kept = backend.kept_bytes(spec, trial.random_weights(spec))
            scratch = [backend.scratch_bytes(spec, tokens) for tokens in (0, 1, 17, 4096)]
            if scratch != sorted(scratch) or not all(type(n) is int for n in (kept, *scratch)):
                raise CheckFailed(f"{spec}: kept_bytes {kept!r}, scratch_bytes of rows {scratch}")
            if kept < 0 or scratch[0] != 0:
                raise CheckFailed(
                    f"{spec}: kept_bytes {kept}, scratch_bytes of 0 rows {scratch[0]}"
                )
        free = memory.free_bytes() if isinstance(memory, Bounded) else 0
        if type(free) is not int or free < 0:
            raise CheckFailed(f"memory {memory.name!r}: free_bytes() is {free!r}")


@check
def output_dtype_and_shape(trial: Trial) -> None:
    """Results are float32 (expert ids int32) and have the shapes that the spec says.

    Whatever the precision of the weights: the residual stream is float32.
    """
    for spec in trial.first_of_kinds():
        block, reference = trial.pair(spec)
        for rows in (1, 17):
            inputs = random_inputs(spec, trial.rng, rows)
            got, want = each(block(*inputs)), each(reference(*inputs))
            described = [[f"{a.dtype}{list(a.shape)}" for a in some] for some in (got, want)]
            if described[0] != described[1]:
                raise CheckFailed(f"{spec}: returned {described[0]}, expected {described[1]}")


@check
def outputs_finite(trial: Trial) -> None:
    """Rows of zeros, of large and of tiny values give neither NaN nor infinity.

    A norm of zeros divides by eps alone; exp(-x) of a large gate overflows.
    """
    for spec in trial.first_of_kinds():
        block = trial.build(spec, trial.random_weights(spec))
        for scale in (0.0, 1e-20, 1.0, 300.0):
            for rows in (1, 17):
                result = block(*random_inputs(spec, trial.rng, rows, scale))
                _require_finite(result, f"{spec} at {rows} rows of size {scale:g}")


@check
def inputs_not_written(trial: Trial) -> None:
    """A block changes no bit of its arguments but the state; only RMSNorm may write `hidden`.

    It may leave the sum there, and nothing else.  Arguments are other blocks' results, or the
    batch, which every layer reads.  Calls with a state take other paths than those without: a
    prefill and a step are looked at, too.
    """
    for spec in trial.first_of_kinds():
        block = trial.build(spec, trial.random_weights(spec))
        for inputs in calls(spec, block, trial.rng):
            _place_negative_zeros(inputs)
            before = [(name, array.copy()) for name, array in arrays_of_arguments(inputs)]
            moved = block.to_memory(inputs)
            result = block.to_host(block.compute(*moved))
            for (name, was), (_, array) in zip(before, arrays_of_arguments(moved), strict=True):
                is_hidden = name == "argument 0" and isinstance(spec, specs.RMSNorm | specs.Layer)
                if not is_hidden:
                    _require_unwritten(block.to_host(array), was, f"{spec}: {name} after the call")
                elif isinstance(spec, specs.RMSNorm):
                    _require_hidden(block.to_host(array), was, result[0], str(spec))


@check
def results_belong_to_the_caller(trial: Trial) -> None:
    """A later call of the same block, or of another one, changes no result.

    Two batches may be on their way at once; a layer's `hidden` is read again after its operator.
    With a state as without.
    """
    kept = []
    for spec in [s for s in trial.first_of_kinds() for _ in range(2)]:  # two blocks of each kind
        block = trial.build(spec, trial.random_weights(spec))
        for inputs in [one for _ in range(3) for one in calls(spec, block, trial.rng)]:
            result = block.compute(*block.to_memory(inputs))
            kept.append((spec, block, result, block.to_host(result)))
    for spec, block, result, was in kept:
        assert_same(block.to_host(result), was, f"{spec}: a result after later calls")


def _tree(spec: Spec) -> Iterator[Spec]:
    """Yield a spec, its parts and theirs."""
    yield spec
    for part in spec.parts():
        yield from _tree(part.spec)


def _place_negative_zeros(inputs: Iterable[Any]) -> None:
    """Put a -0 into every float argument, which is equal to the 0 that a sum makes of it."""
    for _, array in arrays_of_arguments(inputs):
        if array.dtype.kind == "f":
            array[0, 0] = -0.0


def _require_unwritten(array: HostArray, was: HostArray, what: str) -> None:
    assert_same(array, was, what)
    if array.tobytes() != was.tobytes():
        raise CheckFailed(f"{what}: equal values, but not the same bits; 0 for -0, for example")


def _require_hidden(array: HostArray, was: HostArray, total: HostArray, what: str) -> None:
    """Raise `CheckFailed` unless `hidden` is as it was, or has the sum in it."""
    if array.tobytes() not in (was.tobytes(), total.tobytes()):
        raise CheckFailed(f"{what}: it wrote into hidden what is not the sum that it returned")


def _require_finite(result: Result, what: str) -> None:
    for array in each(result):
        if not np.all(np.isfinite(array)):
            first = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
            raise CheckFailed(f"{what}: {array[first]} at {list(first)}")
