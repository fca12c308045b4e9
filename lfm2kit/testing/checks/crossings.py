"""Blocks called in the midst of another memory's work.

That memory is a device that is a thread (`lfm2kit.testing.device`), which waits at random.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from threading import Event
from typing import Any, NamedTuple

from lfm2kit import specs
from lfm2kit.backend import HOST, Block, Crosses, Crossing, TellsWaits
from lfm2kit.promises import Promise
from lfm2kit.seam import begun
from lfm2kit.specs import Spec
from lfm2kit.testing.cases import CASES
from lfm2kit.testing.checks.registry import guards
from lfm2kit.testing.device import DeviceArray, DeviceMemory
from lfm2kit.testing.random_inputs import random_inputs
from lfm2kit.testing.trial import Trial
from lfm2kit.testing.verdicts import CheckFailed, Skipped

DELAY = 1e-4  # seconds, at most, before each piece of work
SHORT = 0.2  # seconds that a wait takes that ends without an answer
PATIENCE = 2.0  # seconds until the device must have reached the begin of a wait
BEGUN, ANSWERED, OVER = "begun", "answered", "over"
FORWARDS = 6
NAMES = ("layers.2.crossed", "layers.3.crossed")


class Crossed(NamedTuple):
    """A block of the host's memory, and its crossing."""

    block: Block
    crossing: Crossing


@guards(Promise.REPEATABILITY)
def crossings_have_the_blocks_bits(trial: Trial) -> None:
    """A crossing returns what its block returns, whatever was called before.

    Two blocks of one kind take turns, with the same and with other numbers of rows, and nobody
    waits between their calls.  Then both are begun before either is ended.
    """
    device = DeviceMemory(DELAY)
    for spec in _crossed_specs(trial, device):
        pair = [_crossed(trial, device, spec, name) for name in NAMES]
        for rows in (17, 0, 1, 17, 700, 5):
            inputs = [random_inputs(spec, trial.rng, rows) for _ in range(3)]
            with _forward(device, pair[0]):
                there = [[device.from_host(array) for array in one] for one in inputs]
                got = [[one.crossing(*arrays) for one in pair] for arrays in there[:2]]
                got.append(_begun_together(pair, there[2]))
                found = [[_to_host(device, result) for result in results] for results in got]
            for values, results in zip(inputs, found, strict=True):
                for one, result, name in zip(pair, results, NAMES, strict=True):
                    trial.assert_same(result, one.block(*values), f"{name}: {spec} of {rows} rows")


@guards(Promise.REPEATABILITY)
def crossings_can_be_replayed(trial: Trial) -> None:
    """Recorded calls of crossings, replayed, return what the blocks make of new arguments."""
    device = DeviceMemory(DELAY)
    for spec in _crossed_specs(trial, device):
        pair = [_crossed(trial, device, spec, name) for name in NAMES]
        for rows in (9, 600):
            inputs = random_inputs(spec, trial.rng, rows)
            sources = [DeviceArray(array.shape) for array in inputs]
            with _forward(device, pair[0]):
                for one in pair:  # outside of a recording, which cannot wait
                    one.crossing(*(device.from_host(array) for array in inputs))
            replay = device.recorded(partial(_calls_twice, pair, sources))
            for _ in range(FORWARDS):
                inputs = random_inputs(spec, trial.rng, rows)
                with _forward(device, pair[0]):
                    for source, array in zip(sources, inputs, strict=True):
                        device.enqueue(partial(source.take, array))
                    found = [_to_host(device, result) for result in replay()]
                for one, result in zip(pair * 2, found, strict=True):
                    trial.assert_same(
                        result, one.block(*inputs), f"{spec} of {rows} rows, replayed"
                    )


@guards(Promise.REPEATABILITY)
def crossings_fail_by_name(trial: Trial) -> None:
    """A block that raises or is too late ends its forward with its name; the next one is right.

    So does a forward that ends by itself while a block is called.
    """
    device = DeviceMemory(DELAY, longest_wait=SHORT)
    for spec in _crossed_specs(trial, device)[:1]:
        crossed = _crossed(trial, device, spec, "layers.2.good")
        inputs = random_inputs(spec, trial.rng, 5)
        faults: dict[str, Callable[[], None]] = {
            "layers.3.raises": _raise,
            "layers.3.late": partial(time.sleep, 2 * SHORT),
        }
        for name, fault in faults.items():
            faulty = _faulty(trial, device, spec, name, crossed.block, fault)
            _judge_calls(trial, device, crossed, inputs)
            _call(device, faulty, inputs)  # the first call is not at fault
            said = _failure(_call, device, faulty, inputs)
            if said is None or name not in str(said):
                raise CheckFailed(f"a block at fault, {name}, was reported as: {said}")
            _judge_calls(trial, device, crossed, inputs)
        slowly = partial(time.sleep, SHORT / 2)
        slow = _faulty(trial, device, spec, "layers.4.slow", crossed.block, slowly)
        _call(device, slow, inputs)
        said = _failure(_call, device, slow, inputs, _raise)
        if not isinstance(said, PlantedError):
            raise CheckFailed(f"a forward that raised an error of its own ended with: {said}")
        _judge_calls(trial, device, crossed, inputs)


@guards(Promise.REPEATABILITY)
def crossings_tell_their_waits(trial: Trial) -> None:
    """A crossing with `tell_waits` tells a wait for each answer, in each call, until None.

    The wait has begun before the block answers, and is told to be over behind the answer.  Results
    have the same bits.
    """
    device, telling = DeviceMemory(DELAY), 0
    for spec in _crossed_specs(trial, device):
        name, inputs = "layers.2.patient", random_inputs(spec, trial.rng, 5)
        has_begun, moments = Event(), list[str]()
        block = _crossed(trial, device, spec, name).block
        patient = _faulty(trial, device, spec, name, block, partial(_await, has_begun, moments))
        if not isinstance(patient.crossing, TellsWaits):
            continue
        telling += 1
        _call(device, patient, inputs)  # shows the forms
        patient.crossing.tell_waits(partial(_note_wait, device, has_begun, moments))
        result = _call(device, patient, inputs)
        trial.assert_same(result, block(*inputs), f"{spec}: a call whose wait is told")
        if moments != [BEGUN, ANSWERED, OVER]:
            raise CheckFailed(f"{spec}: of a wait came, in this order: {', '.join(moments)}")
        patient.crossing.tell_waits(None)
        _call(device, patient, inputs)
        if moments[3:] != [ANSWERED]:
            raise CheckFailed(f"{spec}: after tell_waits(None) it told {', '.join(moments[3:])}")
    if not telling:
        raise Skipped("no crossing has `tell_waits`")


def _note_wait(device: DeviceMemory, has_begun: Event, moments: list[str], is_over: bool) -> None:
    """Let the device note one end of a wait, in the order of its work."""

    def note() -> None:
        moments.append(OVER if is_over else BEGUN)
        has_begun.set()

    device.enqueue(note)


def _await(has_begun: Event, moments: list[str]) -> None:
    """Wait until the device has noted that a wait has begun, but not for ever."""
    has_begun.wait(PATIENCE)
    moments.append(ANSWERED)


class PlantedError(Exception):
    """An error that a check raises."""


def _raise() -> None:
    raise PlantedError("planted")


def _crossed_specs(trial: Trial, device: DeviceMemory) -> list[Spec]:
    """Return the first spec of each kind that the backend calls from the device.

    Experts come twice, once with a part of them.
    """
    backend = trial.backend
    if not isinstance(backend, Crosses):
        raise Skipped("it crosses no memories")
    first = [one[0] for one in CASES.values() if trial.reference.why_unsupported(one[0]) is None]
    found = [spec for spec in first if backend.why_not_crossed(spec, HOST, device) is None]
    if not found:
        raise Skipped(f"it crosses nothing here: {backend.why_not_crossed(first[0], HOST, device)}")
    found += [_some_of(spec) for spec in found if isinstance(spec, specs.Experts)]
    return sorted(found, key=lambda spec: not isinstance(spec, specs.Choice))


def _some_of(spec: specs.Experts) -> specs.Experts:
    """Return experts of which not all are here: they need some of the rows only."""
    return replace(spec, local_experts=spec.local_experts[1::3])


def _crossed(trial: Trial, device: DeviceMemory, spec: Spec, name: str) -> Crossed:
    """Return a block of random weights: the backend's own, if it builds one on the host."""
    weights, backend = trial.random_weights(spec), trial.backend
    assert isinstance(backend, Crosses)
    is_own = backend.why_unsupported(spec) is None and backend.memory(spec).name == HOST.name
    block = (backend if is_own else trial.reference).build(spec, weights)
    return Crossed(block, backend.crossing(name, spec, block, HOST, device))


def _faulty(
    trial: Trial,
    device: DeviceMemory,
    spec: Spec,
    name: str,
    block: Block,
    fault: Callable[[], None],
) -> Crossed:
    """Return a block that is at fault from its second call on."""
    calls = iter(range(2**31))

    def faulty(*inputs: Any) -> Any:
        if next(calls):
            fault()
        return block(*inputs)

    assert isinstance(trial.backend, Crosses)
    return Crossed(faulty, trial.backend.crossing(name, spec, faulty, HOST, device))


def _begun_together(pair: Sequence[Crossed], arrays: Sequence[DeviceArray]) -> list[Any]:
    pending = [begun(one.crossing, *arrays) for one in pair]
    return [one.end() for one in pending]


def _calls_twice(pair: Sequence[Crossed], sources: Sequence[DeviceArray]) -> list[Any]:
    return [one.crossing(*sources) for one in (*pair, *pair)]


@contextmanager
def _forward(device: DeviceMemory, crossed: Crossed) -> Iterator[None]:
    """Give a forward what the core gives it: a stream, which ends, and the server."""
    with device.stream():
        here = device.mark()
        try:
            with crossed.crossing.server.serving():
                yield
        finally:
            device.mark().seconds_since(here)


def _call(
    device: DeviceMemory, crossed: Crossed, inputs: Any, then: Callable[[], None] = lambda: None
) -> Any:
    with _forward(device, crossed):
        result = crossed.crossing(*(device.from_host(array) for array in inputs))
        then()
        return _to_host(device, result)


def _judge_calls(trial: Trial, device: DeviceMemory, crossed: Crossed, inputs: Any) -> None:
    for _ in range(2):
        result = _call(device, crossed, inputs)
        trial.assert_same(result, crossed.block(*inputs), "a block beside one at fault")


def _failure(call: Callable[..., object], *arguments: Any) -> Exception | None:
    try:
        call(*arguments)
    except Exception as error:
        return error
    return None


def _to_host(device: DeviceMemory, result: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(map(device.to_host, result))
    return device.to_host(result)
