"""What a block returns, as it is: arrays of its memory, plain, new, and the caller's own.

Other blocks index a result by its address, and crash or read past it where it has gaps.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lfm2kit import specs
from lfm2kit.backend import Fills
from lfm2kit.promises import Promise
from lfm2kit.testing.cases import CASES
from lfm2kit.testing.checks.registry import check, guards
from lfm2kit.testing.compare import each
from lfm2kit.testing.guards import arrays_of_arguments, guarded, require_whole_margins
from lfm2kit.testing.host_block import HostBlock
from lfm2kit.testing.random_inputs import random_inputs
from lfm2kit.testing.raw_results import POISON, described, kind_of, overwrite, type_name
from lfm2kit.testing.sessions import calls
from lfm2kit.testing.trial import Trial
from lfm2kit.testing.verdicts import CheckFailed, Skipped


@check
def results_are_plain_arrays(trial: Trial) -> None:
    """Results are arrays of the block's memory: C-contiguous, float32 (ids int32), of right shape.

    Not None, not another library's tensor nor a subclass of `ndarray`, not a transposed array, not
    one with gaps or at an unaligned address.  With a state as without, and for many rows.
    """
    for spec in trial.first_of_kinds():
        block, reference = trial.pair(spec)
        ours, theirs = (calls(spec, one, np.random.default_rng(3)) for one in (block, reference))
        for inputs, same_inputs in zip(ours, theirs, strict=True):
            result = block.compute(*block.to_memory(inputs))
            want = reference(*same_inputs)
            if _count(result) != _count(want):
                raise CheckFailed(f"{spec}: returned {described(result)}, not {described(want)}")
            for got, expected in zip(each(result), each(want), strict=True):
                _require_form(block, got, expected, str(spec))


def _require_form(block: HostBlock, got: Any, expected: Any, what: str) -> None:
    """Raise `CheckFailed` unless `got` is an array of the block's memory, formed as `expected`."""
    kind = type(block.memory.from_host(expected.copy()))
    if not isinstance(got, kind):
        raise CheckFailed(
            f"{what}: returned {kind_of(got)}; "
            f"arrays in memory {block.memory.name!r} are {type_name(kind)}"
        )
    host = block.memory.to_host(got)
    if (host.dtype, host.shape) != (expected.dtype, expected.shape):
        raise CheckFailed(f"{what}: returned {described(host)}, not {described(expected)}")
    flags = getattr(got, "flags", None)
    if not getattr(flags, "c_contiguous", True):
        raise CheckFailed(f"{what}: returned {described(host)}, not C-contiguous")


@guards(Promise.REPEATABILITY)
def results_are_new_arrays(trial: Trial) -> None:
    """A result shares no memory with an argument, a weight or another result, and can be written.

    Writing into it changes no call.  RMSNorm adds in place into what another block returned.  It
    may return its argument `hidden`, and so may a layer.  Only memories whose arrays can be written
    from here are judged.
    """
    for spec in trial.first_of_kinds():
        block = trial.build(spec, trial.random_weights(spec))
        for inputs in calls(spec, block, trial.rng):
            want = block(*inputs)  # which is overwritten at once
            what = f"{spec}, the same call after a result was overwritten"
            trial.assert_same(block(*inputs), want, what)
            if not isinstance(spec, specs.RMSNorm | specs.Layer):
                _judge_the_same_arguments(
                    trial, block, inputs, want, f"{what}, with the same arrays"
                )


def _judge_the_same_arguments(
    trial: Trial, block: HostBlock, inputs: Any, want: Any, what: str
) -> None:
    """Call twice with the very same arrays, by which a block may recognise a call."""
    moved = block.to_memory(inputs)
    overwrite(block.compute(*moved))
    trial.assert_same(block.to_host(block.compute(*moved)), want, what)


@guards(Promise.REPEATABILITY)
def filled_results_have_the_same_bits(trial: Trial) -> None:
    """`fill` writes all of the results of a call, with its bits, whatever was there before."""
    filling = 0
    for spec in trial.supported(spec for kind in CASES for spec in CASES[kind]):
        block = trial.build(spec, trial.random_weights(spec))
        if spec.has_state or not isinstance(block.block, Fills):
            continue
        filling += 1
        for rows in (17, 5, 1):
            inputs = random_inputs(spec, trial.rng, rows)
            if isinstance(spec, specs.Experts):
                inputs[1][0] = -1  # nobody's: the first row is zero
            want = each(block(*inputs))
            poison = [np.full_like(array, POISON[array.dtype.kind]) for array in want]
            results, moved = list(map(guarded, poison)), block.to_memory(inputs)
            block.block.fill(results, *moved)
            what = f"{spec}: what fill wrote, {rows} rows"
            trial.assert_same(tuple(results), tuple(want), what)
            require_whole_margins(arrays_of_arguments(moved), what)
            require_whole_margins(((f"result {i}", r) for i, r in enumerate(results)), what)
    if not filling:
        raise Skipped("no block can write its results into given arrays")


def _count(result: Any) -> int:
    """Return the number of arrays in a tuple, or -1 for anything but a tuple."""
    return len(result) if isinstance(result, tuple) else -1
