"""A device that draws while the host goes on; and others, of which each is wrong in one way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lfm2kit.backend import Batch
from lfm2kit.engine.drawing import Drawn, NumPySampler, Row, Sampler
from lfm2kit.memory import Array, Mark
from lfm2kit.testing.device import DeviceArray, DeviceMemory, _Event
from tests.conformance.crossing import DeviceBackend, Replay


class DeviceSampler:
    """Draws on a device what another sampler draws on the host, and notes what is done when."""

    in_place_of_errors = 0

    def __init__(self, memory: DeviceMemory, sampler: Sampler) -> None:
        self.memory = memory
        self.sampler = sampler
        self.log: list[tuple[str, int]] = []  # what, and which drawing
        self.begun = 0

    def draw(self, logits: Any, rows: Sequence[Row | None]) -> Any:
        return self.sampler.draw(self.memory.to_host(logits), rows)

    def begin(self, logits: Any, rows: Sequence[Row | None], newest: Any = None) -> DeviceDrawing:
        self.log.append(("begin", self.begun))
        self.begun += 1
        return DeviceDrawing(self, logits, rows, newest)


class DeviceDrawing:
    def __init__(
        self, made_by: DeviceSampler, logits: Any, rows: Sequence[Row | None], newest: Any
    ) -> None:
        self._log = made_by.log
        self._number = made_by.begun - 1
        self._results: list[Any] = []

        def draw(made: Any) -> None:
            known = rows if newest is None else list(map(_with_newest, rows, newest.values))
            self._results = made_by.sampler.draw(logits.values, known)
            error = made_by.in_place_of_errors
            ids = [one.token_id if isinstance(one, Drawn) else error for one in self._results]
            made.values = np.array(ids, np.int32)

        self.token_ids: Array = made_by.memory.made((len(rows),), draw)
        self._arriving = made_by.memory.start_to_host(self.token_ids)

    def end(self) -> list[Any]:
        self._log.append(("end", self._number))
        self._arriving.wait()
        return self._results


def _with_newest(row: Row | None, token_id: int) -> Row | None:
    if row is None:
        return None
    generated = row.generated.copy()
    generated[-1:] = token_id
    return row._replace(generated=generated)


class DrawsAhead(DeviceBackend):
    """A device with a sampler of its own."""

    def __init__(self, made: type[DeviceSampler] = DeviceSampler) -> None:
        super().__init__()
        self._made = made

    def sampler(self) -> Sampler:
        return self._made(self.device, NumPySampler())


class ForgetsTheNewest(DeviceSampler):
    def begin(self, logits: Any, rows: Sequence[Row | None], newest: Any = None) -> DeviceDrawing:
        return super().begin(logits, rows)


class LeavesErrorsAmongIds(DeviceSampler):
    in_place_of_errors = -1


class TakesItsOwnIds(DeviceBackend):
    """Its replays do not look at the ids that the device has."""

    def capture(self, step: Callable[[Batch], Any], batch: Batch) -> Replay:
        return _OfItsOwnIds(step, batch, self.device)


class _OfItsOwnIds(Replay):
    def with_ids(self, batch: Batch, token_ids: DeviceArray) -> DeviceArray:
        return self(batch)


class TimedOnce(DrawsAhead):
    """Its marks know the first time that they were reached, and no later one."""

    def __init__(self) -> None:
        super().__init__()
        self.device = KeepsTheFirstTime()


class KeepsTheFirstTime(DeviceMemory):
    def timed_mark(self) -> Mark:
        event = ReachedOnce(self._stream())
        self.enqueue(event.reach)
        return event


class ReachedOnce(_Event):
    def reach(self) -> None:
        if not self._is_reached.is_set():
            super().reach()
