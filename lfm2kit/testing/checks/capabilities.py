"""Capabilities that are more than another way to call a block: what a backend says beforehand."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lfm2kit import specs
from lfm2kit.backend import (
    F32,
    HOST,
    Begins,
    CallsNatively,
    Exclusive,
    Explains,
    Format,
    KeepsFormats,
    Measures,
    Memory,
    MemoryFigures,
    NamesHardware,
    Near,
    PinsMemory,
    ReadsRows,
    TellsParts,
)
from lfm2kit.building.answers import Answers
from lfm2kit.errors import Lfm2kitError
from lfm2kit.promises import Promise
from lfm2kit.specs import Spec
from lfm2kit.testing.allocations import traced_array_bytes, tracing
from lfm2kit.testing.cases import CASES
from lfm2kit.testing.checks.registry import check, guards
from lfm2kit.testing.compare import each
from lfm2kit.testing.guards import arrays_of_arguments, guarded, require_whole_margins
from lfm2kit.testing.host_block import HostBlock
from lfm2kit.testing.random_inputs import random_inputs
from lfm2kit.testing.raw_results import POISON
from lfm2kit.testing.trial import Trial
from lfm2kit.testing.verdicts import CheckFailed, Skipped
from lfm2kit.weights import Tensor, Weights

SLACK = 4096  # bytes
SLOWEST, FASTEST = 1e6, 1e18  # of machines, in operations or bytes per second

NATIVE = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 3)


@check
def weights_are_described_unread(trial: Trial) -> None:
    """`kept_bytes`, `kept_formats` and `pinned_bytes` are told by shapes and formats alone.

    They are asked about a whole checkpoint, whose values take minutes to read; here these cannot be
    read.  `kept_formats` names each weight, and nothing else.
    """
    backend = trial.backend
    if not isinstance(backend, MemoryFigures | KeepsFormats | PinsMemory):
        raise Skipped("it says nothing about weights")
    answers = Answers(backend, "on trial")
    for spec in _built_whole(trial):
        weights = _unreadable(spec)
        if isinstance(backend, MemoryFigures):
            _told(answers.kept_bytes, spec, weights)
        if isinstance(backend, PinsMemory):
            _told(answers.pinned_bytes, spec, weights)
        if isinstance(backend, KeepsFormats):
            kept = _told(answers.kept_formats, spec, weights)
            if kept.keys() != spec.parameters().keys():
                raise CheckFailed(
                    f"{spec}: kept_formats names {sorted(kept)}, not {sorted(spec.parameters())}"
                )


@check
def kept_bytes_are_kept(trial: Trial) -> None:
    """`kept_bytes` is neither more nor less than what a block keeps, as far as the suite sees it.

    On the host it is compared with the arrays that are there after `build`, some of which may be
    buffers.  More than is kept refuses a model that fits.
    """
    backend = trial.backend
    if not isinstance(backend, MemoryFigures):
        raise Skipped("it does not say how much memory a block will take")
    for spec in _built_whole(trial, -1):
        if backend.memory(spec).name != HOST.name:
            continue
        weights = trial.random_weights(spec)
        backend.build(spec, weights)  # imports modules, and compiles
        with tracing():
            before = traced_array_bytes()
            block = backend.build(spec, weights)
            made = traced_array_bytes() - before
            del block
        said, whole = backend.kept_bytes(spec, weights), 4 * spec.weight_elements()
        if said > 1.05 * made + SLACK or made > 1.25 * said + 0.25 * whole + SLACK:
            raise CheckFailed(f"{spec}: kept_bytes is {said}, but build left {made} bytes")


@check
def facts_about_the_machine(trial: Trial) -> None:
    """`notes`, `hardware`, `unit` and `near_cores` are in the form that they are asked for in.

    A note is one line.  What names a device names the same one when it is asked again.
    """
    backend, answers = trial.backend, Answers(trial.backend, "on trial")
    if isinstance(backend, Explains):
        for note in _told(answers.notes):
            if not note.strip() or len(note.splitlines()) != 1:
                raise CheckFailed(f"a note is not one line: {note!r}")
    if isinstance(backend, NamesHardware):
        hardware, again = (dict(_told(answers.hardware)) for _ in range(2))
        if not hardware or hardware != again:
            raise CheckFailed(f"hardware is {hardware}, and {again} when asked again")
    for memory in [backend.memory(spec) for spec in _built_whole(trial)]:
        _judge_memory(memory)


def _judge_memory(memory: Memory) -> None:
    if isinstance(memory, Exclusive):
        unit, again = memory.unit(), memory.unit()
        if not isinstance(unit, str) or not unit or unit != again:
            raise CheckFailed(f"unit is {unit!r}, and {again!r} when asked again")
    if isinstance(memory, Near):
        cores = list(memory.near_cores())
        if not all(isinstance(core, int) and core >= 0 for core in cores):
            raise CheckFailed(f"near_cores are {cores}")


@check
def ceilings_are_those_of_a_machine(trial: Trial) -> None:
    """`ceilings` are figures that a machine can have, of each second and not in billions.

    Efficiency is counted in them, and rates that place experts are kept with them.
    """
    if not isinstance(trial.backend, Measures):
        raise Skipped("it measures no ceilings")
    ceilings = _told(Answers(trial.backend, "on trial").ceilings)
    for name, figure in ceilings._asdict().items():
        if not SLOWEST <= figure <= FASTEST:
            raise CheckFailed(f"ceilings.{name} is {figure:g}, which no machine does in a second")


@check
def rows_are_rounded_for_experts_alone(trial: Trial) -> None:
    """`row_format` is F32 for whatever is not experts, and F32, BF16 or F16 for them."""
    if not isinstance(trial.backend, ReadsRows):
        raise Skipped("it has no `row_format`")
    answers = Answers(trial.backend, "on trial")
    for spec in trial.first_of_kinds():
        row_format = _told(answers.row_format, spec)
        if row_format != F32 and not isinstance(spec, specs.Experts):
            raise CheckFailed(f"{spec}: row_format is {row_format}, but its rows do not travel")


@guards(Promise.REPEATABILITY)
def begun_calls_have_the_blocks_bits(trial: Trial) -> None:
    """`begin(*inputs).end()` has the bits of a call, also where calls are begun beside each other.

    They are ended in either order.
    """
    beginning = 0
    for spec, block in _blocks(trial):
        if spec.has_state or not isinstance(block.block, Begins):
            continue
        beginning += 1
        inputs = [random_inputs(spec, trial.rng, rows) for rows in (17, 5, 17, 1, 0)]
        wanted = [block(*one) for one in inputs]
        for step in (1, -1):
            begun = [block.block.begin(*block.to_memory(one)) for one in inputs]
            ended = [(i, begun[i].end()) for i in range(len(begun))[::step]]
            for i, result in ended:
                what = f"{spec}: a call of {len(inputs[i][0])} rows that was begun"
                trial.assert_same(block.to_host(result), wanted[i], what)
    if not beginning:
        raise Skipped("no block can be begun")


@guards(Promise.REPEATABILITY)
def parts_are_told_by_their_paths(trial: Trial) -> None:
    """A block with `tell_parts` tells its parts' paths of roles in order, in each call, until None.

    No part is told twice in a call, nor one within another that is told.  A result has the same
    bits whether parts are told or not.
    """
    telling = 0
    for spec, block in _blocks(trial):
        if not isinstance(block.block, TellsParts):
            continue
        telling += 1
        inputs = random_inputs(spec, trial.rng, 7)
        want, told = block(*inputs), list[str]()
        block.block.tell_parts(told.append)
        for _ in range(2):
            told.clear()
            trial.assert_same(block(*inputs), want, f"{spec}: a call whose parts are told")
            _judge_told(spec, told)
        block.block.tell_parts(None)
        told.clear()
        block(*inputs)
        if told:
            raise CheckFailed(f"{spec}: after tell_parts(None) it told {told[0]!r}")
    if not telling:
        raise Skipped("no block tells its parts")


def _judge_told(spec: Spec, told: list[str]) -> None:
    """Raise `CheckFailed` unless these are the parts that a block may tell in one call."""
    known = list(_paths(spec))
    if not told:
        raise CheckFailed(f"{spec}: it has tell_parts, but told no part in a call")
    for path in told:
        if path not in known:
            raise CheckFailed(f"{spec}: it told {path!r}; its parts are {', '.join(known)}")
    places = [known.index(path) for path in told]
    nested = [path for path in told if any(other.startswith(f"{path}.") for other in told)]
    if places != sorted(set(places)) or nested:
        raise CheckFailed(f"{spec}: it told {', '.join(told)}, in another order than they come in")


def _paths(spec: Spec) -> Iterator[str]:
    """Yield the paths of roles of all parts, each before the parts within it."""
    for part in spec.parts():
        yield part.role
        for path in _paths(part.spec):
            yield f"{part.role}.{path}"


@guards(Promise.BATCH_INVARIANCE)
def native_calls_have_the_blocks_bits(trial: Trial) -> None:
    """A block as machine code fills its results with the bits of a call, in any parts and order."""
    found = [one for one in _blocks(trial) if isinstance(one[1].block, CallsNatively)]
    if not found:
        raise Skipped("no block can be called as machine code")
    for spec, block in found:
        assert isinstance(block.block, CallsNatively)
        native = block.block.native()
        for rows, parts in ((17, 1), (17, 3), (1, 4), (0, 2)):
            inputs = random_inputs(spec, trial.rng, rows)
            want = each(block(*inputs))
            moved = block.to_memory(inputs)
            results = [guarded(np.full_like(one, POISON[one.dtype.kind])) for one in want]
            _call_natively(native, moved, results, rows, parts)
            what = f"{spec}: {rows} rows as machine code in {parts} parts"
            trial.assert_same(tuple(results), want, what)
            require_whole_margins(arrays_of_arguments(moved), what)
            require_whole_margins(((f"result {i}", r) for i, r in enumerate(results)), what)


def _call_natively(native: Any, inputs: Any, results: Any, rows: int, parts: int) -> None:
    pointers = [
        (ctypes.c_void_p * len(some))(*(a.ctypes.data for a in some)) for some in (inputs, results)
    ]
    for part in range(parts)[::-1]:
        NATIVE(native.function)(native.argument, *pointers, rows, part, parts)


def _told(ask: Callable[..., Any], *asked: Any) -> Any:
    """Return an answer; raise `CheckFailed` with the words of the core, if it refuses it."""
    try:
        return ask(*asked)
    except Lfm2kitError as error:
        raise CheckFailed(str(error)) from error


def _unreadable(spec: Spec) -> Weights:
    """Return weights in a format that cannot be unpacked."""
    format = Format("unreadable", 1, np.dtype(np.uint16), _refuse)
    shapes = spec.parameters().items()
    return Weights({n: Tensor(n, format, s, np.zeros(s, np.uint16)) for n, s in shapes})


def _refuse(*arrays: Any) -> Any:
    raise CheckFailed("it reads values before it builds")


def _built_whole(trial: Trial, which: int = 0) -> list[Spec]:
    """Return one spec of each kind that the backend builds whole, the first or the last."""
    whole: dict[str, list[Spec]] = {}
    for spec in trial.supported(spec for kind in CASES for spec in CASES[kind]):
        if trial.backend.why_unsupported(spec) is None:
            whole.setdefault(spec.kind, []).append(spec)
    return [some[which] for some in whole.values()]


def _blocks(trial: Trial) -> Iterator[tuple[Spec, HostBlock]]:
    for spec in trial.first_of_kinds():
        yield spec, trial.build(spec, trial.random_weights(spec))
