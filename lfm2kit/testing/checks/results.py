"""What a block returns, as it is: arrays of its memory, plain, new, and the caller's own.

Other blocks index a result by its address, and crash or read past it where it has gaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lfm2kit import specs
from lfm2kit.backend import HOST, Fills
from lfm2kit.specs import Spec
from lfm2kit.testing.cases import CASES
from lfm2kit.testing.checks.registry import check
from lfm2kit.testing.compare import assert_same, each
from lfm2kit.testing.guards import arrays_of_arguments, guarded, require_whole_margins
from lfm2kit.testing.host_block import HostBlock
from lfm2kit.testing.random_inputs import random_inputs
from lfm2kit.testing.sessions import calls
from lfm2kit.testing.trial import Trial
from lfm2kit.testing.verdicts import CheckFailed, Skipped

POISON = {"f": np.nan, "i": -7777}  # by the kind of dtype


@check
def results_are_plain_arrays(trial: Trial) -> None:
    """Results are arrays of the block's memory: C-contiguous, float32 (ids int32), of right shape.

    Not None, not another library's tensor, not a transposed array, not one with gaps.  With a
    state as without.
    """
    for spec in trial.first_of_kinds():
        block, reference = trial.pair(spec)
        ours, theirs = (calls(spec, one, np.random.default_rng(3)) for one in (block, reference))
        for inputs, same_inputs in zip(ours, theirs, strict=True):
            result = block.compute(*block.to_memory(inputs))
            want = reference(*same_inputs)
            if _count(result) != _count(want):
                raise CheckFailed(f"{spec}: returned {_described(result)}, not {_described(want)}")
            for got, expected in zip(each(result), each(want), strict=True):
                _require_plain(block, got, expected, str(spec))


def _require_plain(block: HostBlock, got: Any, expected: Any, what: str) -> None:
    """Raise `CheckFailed` unless `got` is a plain array of the block's memory, as `expected` is."""
    kind = type(block.memory.from_host(expected.copy()))
    if not isinstance(got, kind):
        raise CheckFailed(
            f"{what}: returned {_kind(got)}; "
            f"arrays in memory {block.memory.name!r} are {_type_name(kind)}"
        )
    host = block.memory.to_host(got)
    if (host.dtype, host.shape) != (expected.dtype, expected.shape):
        raise CheckFailed(f"{what}: returned {_described(host)}, not {_described(expected)}")
    flags = getattr(got, "flags", None)
    if not getattr(flags, "c_contiguous", True):
        raise CheckFailed(
            f"{what}: returned {_described(host)}, not C-contiguous: its strides are {got.strides}"
        )


@check
def results_are_new_arrays(trial: Trial) -> None:
    """A result shares no memory with an argument or a weight: writing into it changes no call.

    RMSNorm adds in place into what another block returned.  It may return its argument `hidden`,
    and so may a layer.  Only memories whose arrays can be written from here are judged.
    """
    for spec in trial.first_of_kinds():
        block = trial.build(spec, trial.random_weights(spec))
        for inputs in calls(spec, block, trial.rng):
            want = block(*inputs)
            moved = block.to_memory(inputs)
            result = each(block.compute(*moved))
            if not all(hasattr(array, "fill") for array in result):
                continue
            if block.memory.name == HOST.name:
                _require_own(spec, result, moved)
            for array in result:
                array.fill(7)
            what = f"{spec}, the same call after a result was overwritten"
            assert_same(block(*inputs), want, what)


@check
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
            assert_same(tuple(results), tuple(want), what)
            require_whole_margins(arrays_of_arguments(moved), what)
            require_whole_margins(((f"result {i}", r) for i, r in enumerate(results)), what)
    if not filling:
        raise Skipped("no block can write its results into given arrays")


def _require_own(spec: Spec, result: tuple[Any, ...], arguments: Sequence[Any]) -> None:
    """Raise `CheckFailed` if a host result is read-only, or shares memory with an argument."""
    if not all(array.flags.writeable for array in result):
        raise CheckFailed(f"{spec}: a result is read-only, but it belongs to the caller")
    may_return_hidden = isinstance(spec, specs.RMSNorm | specs.Layer)
    for i, argument in enumerate(arguments[may_return_hidden:], start=may_return_hidden):
        is_array = isinstance(argument, np.ndarray)
        if is_array and any(np.may_share_memory(array, argument) for array in result):
            raise CheckFailed(f"{spec}: a result shares memory with argument {i}")


def _count(result: Any) -> int:
    """Return the number of arrays in a tuple, or -1 for anything but a tuple."""
    return len(result) if isinstance(result, tuple) else -1


def _described(result: Any) -> str:
    """Return types and shapes in words: "float32 [17, 24]"."""
    if isinstance(result, tuple):
        return f"({', '.join(map(_described, result))})"
    if hasattr(result, "dtype") and hasattr(result, "shape"):
        return f"{result.dtype} {list(result.shape)}"
    return _kind(result)


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {_type_name(type(value))}"


def _type_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
