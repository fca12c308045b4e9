"""Computes the masks of constrained sequences in threads, while forwards run (decision 0039).

One thread computes the masks of all sequences, in their order.  A sequence whose mask is late keeps
that thread for itself, and another one goes on with the others'.  So it holds up nobody else.  A
late sequence draws no token, and is not computed, until its mask is there; if its late masks
take too long together, it fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from time import monotonic

import numpy as np
import numpy.typing as npt

from lfm2kit.engine.followed import Followed, Next
from lfm2kit.engine.line import Line
from lfm2kit.engine.requests import FAILED
from lfm2kit.engine.sequence import Sequence
from lfm2kit.errors import Lfm2kitError

Int32 = npt.NDArray[np.int32]

FREE = Next()
CLOSING = 1.0  # seconds that masks may take when an engine is closed


@dataclass(frozen=True, slots=True)
class Patience:
    """How long masks may take, in seconds."""

    step: float = 0.01  # that a step waits for masks after its forward
    sequence: float = 5.0  # that the late masks of a sequence may take together
    clock: Callable[[], float] = monotonic


class Masks:
    """The masks of an engine's sequences.  The engine's thread calls it."""

    def __init__(self, vocab_size: int, patience: Patience) -> None:
        self._vocab_size = vocab_size
        self._patience = patience
        self._texts: dict[Sequence, _Text] = {}
        self._line = _line()
        self._left: list[Line] = []  # of texts that have ended; they may still be at work

    def begin(self, sequences: Iterable[Sequence]) -> None:
        """Have the masks for the next tokens of these sequences computed."""
        for sequence in sequences:
            if sequence.request.constraint is None:
                continue
            if sequence not in self._texts:
                followed = Followed(sequence.request, self._vocab_size)
                self._texts[sequence] = _Text(sequence, followed, self._patience.clock)
            self._texts[sequence].go_on(self._line)

    def collect(self, sequences: Iterable[Sequence]) -> dict[Sequence, Next]:
        """Return what may come next after those sequences whose masks are there, or come soon.

        Those that were late before are not waited for.
        """
        texts = {sequence: self._texts.get(sequence) for sequence in sequences}
        awaited = [text.future for text in texts.values() if text and text.line is None]
        wait(awaited, self._patience.step)
        found = {
            sequence: FREE if text is None else text.future.result()
            for sequence, text in texts.items()
            if text is None or text.future.done()
        }
        for sequence, text in texts.items():
            if text is not None and sequence not in found:
                text.is_late = True
        self._go_on()
        return found

    def late(self) -> set[Sequence]:
        """Return the sequences whose masks were late, and are not there yet."""
        return {one for one, text in self._texts.items() if text.is_late and not text.future.done()}

    def overdue(self) -> dict[Sequence, Next]:
        """Return the ends of those whose late masks have taken too long."""
        most = self._patience.sequence
        why = f"the masks of its constraint took more than {most:g} seconds; make it simpler"
        late = [one for one in self.late() if self._texts[one].late_seconds() > most]
        return {sequence: Next(end=FAILED, error=Lfm2kitError(why)) for sequence in late}

    def wait(self) -> None:
        """Wait a little until a late mask is there."""
        late = [self._texts[sequence].future for sequence in self.late()]
        wait(late, self._patience.step, FIRST_COMPLETED)
        self._go_on()

    def end(self, sequence: Sequence) -> None:
        """Follow a sequence no more; a mask that is being computed is not waited for."""
        text = self._texts.pop(sequence, None)
        if text is None:
            return
        is_at_work = not text.future.cancel() and not text.future.done()
        if is_at_work and text.line is None:
            self._leave_line_to(text)
        if text.line is not None:
            text.line.end()
            self._left.append(text.line)
        self._left = [line for line in self._left if line.is_alive]

    def close(self) -> None:
        """End all threads after the masks that they are computing.

        Those whose masks take longer than a while run on, and keep no process from ending.
        """
        for sequence in list(self._texts):
            self.end(sequence)
        self._line.end()
        until = monotonic() + CLOSING
        for line in (*self._left, self._line):
            line.wait(max(0.0, until - monotonic()))

    def _go_on(self) -> None:
        """Let another thread compute masks if a sequence holds up the one that does."""
        common = [text for text in self._texts.values() if text.line is None]
        if any(text.is_late and not text.future.done() for text in common):
            for text in common:
                if text.future.running():
                    self._leave_line_to(text)
                    return

    def _leave_line_to(self, text: _Text) -> None:
        """Make another line for those that wait behind this text in the common one."""
        text.line, self._line = self._line, _line()
        for other in self._texts.values():
            if other.line is None and other.future.cancel():
                other.submit(self._line)


class _Text:
    """A sequence's text, and the mask that is computed for it."""

    def __init__(self, sequence: Sequence, followed: Followed, clock: Callable[[], float]) -> None:
        self._sequence = sequence
        self._followed = followed
        self._clock = clock
        self.future: Future[Next] = Future()
        self.line: Line | None = None  # its own, which it has held up
        self.is_late = False  # the mask
        self._tokens = -1  # which it follows
        self._started: float | None = None
        self._ended: float | None = None
        self._late_before = 0.0  # seconds of earlier masks

    def go_on(self, line: Line) -> None:
        """Have the next mask computed, unless it was begun already."""
        tokens = len(self._sequence.generated)
        if tokens == self._tokens and not self.future.cancelled():
            return
        if self.is_late:
            self._late_before = self.late_seconds()
        self.is_late = False
        self._started = self._ended = None
        self.submit(line)
        self._tokens = tokens  # at last: a step may be interrupted

    def submit(self, line: Line) -> None:
        """Have the mask computed in its own line, or else in this one."""
        self.future = (self.line or line).submit(self._compute, self._sequence.generated)

    def late_seconds(self) -> float:
        """Return how long its late masks have taken, of which this is one."""
        if self._started is None:
            return self._late_before
        ended = self._clock() if self._ended is None else self._ended
        return self._late_before + ended - self._started

    def _compute(self, generated: Int32) -> Next:
        self._started = self._clock()
        try:
            return self._followed.next(generated)
        finally:
            self._ended = self._clock()


def _line() -> Line:
    return Line("masks")
