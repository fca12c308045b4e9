"""What is being captured in a thread, for work that takes part in it from another stream.

A stream takes part in a capture once it waits for something that was captured, and must have been
waited for when the capture ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol, TypeVar

import cupy

Made = TypeVar("Made", bound="Part")


class Part(Protocol):
    """What takes part in a capture, and keeps device memory that plain calls use as well."""

    def join(self, stream: cupy.cuda.Stream) -> None:
        """Let the captured stream wait for all that was captured elsewhere."""
        ...

    def launching(self, stream: cupy.cuda.Stream) -> AbstractContextManager[None]:
        """Return a context in which a graph is launched in `stream`.

        What was enqueued before has then ended when the graph begins, and what is enqueued later
        begins when the graph has ended.
        """
        ...


class Recording:
    """One capture, from its beginning on."""

    def __init__(self, stream: cupy.cuda.Stream) -> None:
        self._origin = cupy.cuda.Event(disable_timing=True)
        self._origin.record(stream)
        self._parts: dict[object, Any] = {}

    @property
    def parts(self) -> list[Part]:
        return list(self._parts.values())

    def part_of(self, owner: object, make: Callable[[], Made]) -> Made:
        """Return what `owner` has in this capture, made at its first call."""
        if owner not in self._parts:
            self._parts[owner] = make()
        part: Made = self._parts[owner]
        return part

    def join(self, stream: cupy.cuda.Stream) -> None:
        for part in self.parts:
            part.join(stream)

    def branch(self, stream: cupy.cuda.Stream) -> None:
        """Let another stream take part from the beginning of the capture on."""
        stream.wait_event(self._origin)


class _Thread(threading.local):
    recording: Recording | None = None


_THREAD = _Thread()


def current_recording() -> Recording | None:
    """Return what is being captured in this thread; None outside a capture."""
    return _THREAD.recording


@contextmanager
def recording(stream: cupy.cuda.Stream) -> Iterator[Recording]:
    """Give the capture that has begun in `stream`; at the end, the stream waits for all parts.

    After an exception as well: a capture can only be ended where everything has been joined.
    """
    made = _THREAD.recording = Recording(stream)
    try:
        yield made
    except BaseException:
        with suppress(cupy.cuda.runtime.CUDARuntimeError):  # the first error says why
            made.join(stream)
        raise
    else:
        made.join(stream)
    finally:
        _THREAD.recording = None
