"""A backend on a device that is a thread, and one that crosses from there by a simple server.

And others, of which each is wrong in one way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from lfm2kit.backend import HOST, Batch, Block, Crossing, Memory, Spec, Weights
from lfm2kit.batch_rules import ARRAYS
from lfm2kit.building.results import RETURNED
from lfm2kit.pending import Pending
from lfm2kit.reference.backend import ReferenceBackend
from lfm2kit.seam import begun
from lfm2kit.specs import Choice, Scores
from lfm2kit.testing.device import DeviceArray, DeviceMemory
from lfm2kit.testing.device_channel import DeviceCall, DeviceChannel
from lfm2kit.testing.device_picking import DevicePicked, DevicePicker, poisoned
from lfm2kit.testing.simple_server import SimpleCrossing, SimpleServer


class DeviceBlock:
    """A block of the reference that works in the order of a device's streams."""

    def __init__(self, spec: Spec, block: Any, memory: DeviceMemory) -> None:
        self.spec = spec
        self.block = block
        self.memory = memory
        if hasattr(block, "new_state"):
            self.new_state = block.new_state

    def __call__(self, *inputs: Any) -> Any:
        returned = RETURNED[type(self.spec)]
        shape = returned.shape(self.spec, *inputs)
        made = tuple(DeviceArray(shape) for _ in returned.dtypes)

        def work() -> None:
            result = self.block(*map(_values, inputs))
            for array, values in zip(made, result if len(made) > 1 else (result,), strict=True):
                array.values = values

        self.memory.enqueue(work)
        return made if len(made) > 1 else made[0]


def _values(value: Any) -> Any:
    if isinstance(value, Batch):
        arrays = {name: getattr(value, name).values for name in ARRAYS}
        return value.unchecked(**arrays, memory=HOST, copied=None)
    return value.values if isinstance(value, DeviceArray) else value


class Replay:
    """A step that was recorded for batches of one form."""

    nbytes = 0

    def __init__(self, step: Callable[[Batch], Any], batch: Batch, memory: DeviceMemory) -> None:
        self.memory = memory
        self.form = batch.form
        self.numbers = DeviceArray(batch.packed().shape)
        there = batch.unpacked(memory, self.numbers)
        self.replay = memory.recorded(lambda: step(there))

    def __call__(self, batch: Batch) -> DeviceArray:
        self.memory.enqueue(partial(self.numbers.take, batch.packed()))
        return self._logits()

    def with_ids(self, batch: Batch, token_ids: DeviceArray) -> DeviceArray:
        packed = batch.packed()

        def take() -> None:
            packed[: batch.tokens] = token_ids.values
            self.numbers.take(packed)

        self.memory.enqueue(take)
        return self._logits()

    def _logits(self) -> DeviceArray:
        logits = self.replay()
        return self.memory.made(logits.shape, lambda copy: copy.take(logits.values.copy()))

    def close(self) -> None:
        del self.replay


class DeviceBackend(ReferenceBackend):
    """The reference's blocks on a device, captured or not."""

    def __init__(self, memory: DeviceMemory | None = None) -> None:
        self.device = memory or DeviceMemory()
        self.replays: list[Replay] = []

    def memory(self, spec: Spec) -> Memory:
        return self.device

    def build(self, spec: Spec, weights: Weights) -> Block:
        return DeviceBlock(spec, super().build(spec, weights), self.device)

    def capture(self, step: Callable[[Batch], Any], batch: Batch) -> Replay:
        self.replays.append(Replay(step, batch, self.device))
        return self.replays[-1]


class CrossingBackend(ReferenceBackend):
    """Crosses choices and scores by a simple server."""

    def __init__(
        self,
        server: type[SimpleServer] = SimpleServer,
        deadline: float = 20.0,
        made: type[SimpleCrossing] = SimpleCrossing,
    ) -> None:
        self.server = server
        self.made = made
        self.deadline = deadline
        self.servers: dict[str, SimpleServer] = {}

    def why_not_crossed(self, spec: Spec, memory: Memory, outer: Memory) -> str | None:
        return None if isinstance(spec, Choice | Scores) else "only choices and scores"

    def crossing(self, name: str, spec: Spec, block: Block, memory: Memory, outer: Any) -> Crossing:
        if outer.name not in self.servers:
            self.servers[outer.name] = self.server(outer.channel(1, self.deadline))
        return self.made(name, block, outer, self.servers[outer.name])


# Servers that are wrong in one way each.


class AnswersBeforeItHasComputed(SimpleServer):
    def _answer(self, worker: int, number: int) -> None:
        self.channel.answered[worker, 0] = self.channel.sent[0]
        time.sleep(1e-3)
        super()._answer(worker, number)


class AnswersForTheCallBefore(SimpleServer):
    """Looks up what is called one trip too late, so that a layer gets the ids of another one."""

    before: int | None = None

    def _answer(self, worker: int, number: int) -> None:
        before, self.before = self.before, number
        super()._answer(worker, number if before is None else before)


class AnswersTheFirstTripsOnly(SimpleServer):
    """Compares numbers of trips by size, which is wrong after 2^32 - 1."""

    def _work(self, worker: int, seen: int) -> None:
        while not self._is_over:
            if (trip := int(self.channel.sent[0])) > seen:
                seen = trip
                self._answer(worker, int(self.channel.sent[1]))
                self.channel.answered[worker, 0] = trip
            time.sleep(2e-5)


class ForgetsToReset(SimpleServer):
    """Leaves a forward's failure to the next one."""

    @contextmanager
    def serving(self) -> Iterator[None]:
        failed = self.channel.failed.copy()
        with super().serving():
            self.channel.failed[:] = failed
            yield


class HidesFailures(SimpleServer):
    def _check(self) -> None:
        pass


class NamesTheFirstCall(SimpleServer):
    def _check(self) -> None:
        if self.failure is not None or self.channel.failed[1]:
            raise RuntimeError(f"{self._calls[0][0]} has failed")


class SendsBesideAnotherTrip(SimpleCrossing):
    """Begins a trip while another one lies in the same bytes."""

    def begin(self, *inputs: Any) -> Pending:
        shapes = tuple(array.shape for array in inputs)
        if shapes not in self._calls:
            return begun(self.__call__, *inputs)
        call, is_tuple = self._calls[shapes]
        call.send(*inputs)

        def end() -> Any:
            results = call.receive()
            return results if is_tuple else results[0]

        return SimpleNamespace(end=end)


class TellsBehindTheWait(SimpleCrossing):
    """Tells that a wait begins when it is over."""

    def tell_waits(self, told: Any) -> None:
        def both(is_over: bool) -> None:
            for one in (False, True) if is_over else ():
                told(one)

        super().tell_waits(told and both)


class TellsAheadOfTheWait(SimpleCrossing):
    """Tells that a wait is over when it begins."""

    def tell_waits(self, told: Any) -> None:
        def both(is_over: bool) -> None:
            for one in () if is_over else (False, True):
                told(one)

        super().tell_waits(told and both)


class TellsWaitsForEver(SimpleCrossing):
    def tell_waits(self, told: Any) -> None:
        if told is not None:
            super().tell_waits(told)


# Devices whose channels are wrong in one way each.


class BrokenDevice(DeviceMemory):
    def __init__(self, call: type[DeviceCall]) -> None:
        super().__init__(longest_wait=1.0)
        self.made_call = call

    def channel(self, workers: int, deadline: float) -> DeviceChannel:
        channel = super().channel(workers, deadline)
        channel.made_call = self.made_call
        return channel


def device_with(call: type[DeviceCall]) -> DeviceBackend:
    return DeviceBackend(BrokenDevice(call))


class PicksOnABrokenDevice(DeviceMemory):
    def __init__(self, picked: type[DevicePicked]) -> None:
        super().__init__()
        self._picked = picked

    def picker(self, wanted: Collection[int]) -> DevicePicker:
        picker = super().picker(wanted)
        picker.made_picked = self._picked
        return picker


class PutsBackAmongOthers(DevicePicked):
    """Leaves whatever memory holds where no row is put back."""

    def put_back(self, array: DeviceArray) -> DeviceArray:
        def make(made: DeviceArray) -> None:
            values = poisoned(array.values)
            values[self.rows.values] = array.values[: self.count.values[0]]
            made.values = values

        return self.memory.made(array.shape, make)


class WaitsForNothing(DeviceCall):
    def _wait(self) -> None:
        pass


class WaitsForTheFirstWorker(DeviceCall):
    def _is_answered(self) -> bool:
        return bool(self.channel.answered[0, 0] == self.channel.trips)


class WaitsForEver(DeviceCall):
    """Until somebody answers or the host has failed, however late; 1 s counts as for ever."""

    def _wait(self) -> None:
        end = time.monotonic() + 1
        while not self._is_answered() and not self.channel.failed[0] and time.monotonic() < end:
            time.sleep(2e-5)


class WaitsAsLongAsAtFirst(DeviceCall):
    """Takes the deadline along when a trip is enqueued, or made."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._first = super()._deadline()

    def _deadline(self) -> float:
        return self._first


class KeepsBytesAfterAFailure(DeviceCall):
    def _take(self, host: Any, count: DeviceArray | None) -> Any:
        return lambda target: target.take(host.copy())


class AnnouncesBeforeItHasCopied(DeviceCall):
    def _send(self, arrays: Sequence[DeviceArray], count: DeviceArray | None) -> None:
        super()._send([_made(np.zeros_like(host)) for host in self.inputs], count)
        time.sleep(2e-3)
        for host, array in zip(self.inputs, arrays, strict=True):
            host[...] = array.values


class ReturnsItsBuffer(DeviceCall):
    """Results are where the next trip's will be, and not the caller's own."""

    def _take(self, host: Any, count: DeviceArray | None) -> Any:
        return lambda target: target.take(host)


class SendsTheCountBefore(DeviceCall):
    """Tells of the rows of the trip before."""

    def _send(self, arrays: Sequence[DeviceArray], count: DeviceArray | None) -> None:
        before = self.channel.sent[2]
        super()._send(arrays, count)
        self.channel.sent[2] = before


class SendsOneNumber(DeviceCall):
    """Each trip of a call has the number that was counted when it was enqueued."""

    def send(self, *arrays: DeviceArray, count: DeviceArray | None = None) -> None:
        channel = self.channel
        channel.enqueued = number = (getattr(channel, "enqueued", channel.trips) + 1) % 2**32

        def send() -> None:
            channel.trips = (number - 1) % 2**32
            self._send(arrays, count)

        channel.memory.enqueue(send)


def _made(values: Any) -> DeviceArray:
    array = DeviceArray(values.shape)
    array.take(values)
    return array


class ForgetsWhoWasLate(DeviceCall):
    """Sets a flag for a deadline that has passed, but always the first call's."""

    def _wait(self) -> None:
        super()._wait()
        self.channel.failed[1] = min(1, self.channel.failed[1])
