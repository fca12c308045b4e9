"""Ctrl-C, SIGTERM and SIGHUP end the process in every phase, with one line and an exit code.

The handler raises `KeyboardInterrupt`, so that open files are closed and partial files removed.
That alone is not enough.  An exception is lost if it is raised inside a compiler's callback, a
destructor or the import of some extension modules, and no handler runs while the main thread waits
inside a library.  So the signal also wakes a thread, which makes sure that the process ends.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NUDGE = signal.SIGURG  # from the watching thread to the main one; ignored where nobody handles it
INTERVAL = 0.2  # seconds between nudges
SAME = 1.0  # seconds: a signal repeated sooner counts as the same one; `timeout` sends it twice
PATIENCE = 20.0  # seconds until a process that does not unwind is ended


class Interrupted(KeyboardInterrupt):
    """A KeyboardInterrupt that a signal has raised."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def exit_code(error: KeyboardInterrupt) -> int:
    """Return the exit code for a process that `error` ends, as a shell reports the signal."""
    return 128 + (error.number if isinstance(error, Interrupted) else signal.SIGINT)


def told(error: KeyboardInterrupt) -> int:
    """Print a line about the interrupt on stderr, and return its exit code."""
    code = exit_code(error)
    print(_line(code - 128), end="", file=sys.stderr, flush=True)
    return code


class Interrupts:
    """The handlers of this process's signals, until it ends."""

    def __init__(self) -> None:
        self._is_handling = False
        self._received: int | None = None  # the first signal's number
        self._is_over = False  # the command has ended: nothing is left to unwind
        self._code: int | None = None  # the process's exit code, if not the signal's
        self.is_told = False  # the line was printed, or somebody else prints it
        self._heard: Callable[[], None] | None = None  # called at Ctrl-C, which then ends nothing

    def ended(self, command: Callable[[], int]) -> int:
        """Call `command`; return its exit code, or that of a signal that came meanwhile."""
        try:
            self._take()
            code = command()
            self._is_over = True
            self.check()
        except KeyboardInterrupt as error:
            self._is_over = True
            code = exit_code(error) if self.is_told else told(error)
            self.is_told = True
        return code if self._code is None else self._code

    def end(self, code: int) -> None:
        """Make the main thread unwind silently, as after a signal, and exit with `code`.

        For other threads.  Do nothing if signals are not handled here.
        """
        if self._is_handling:  # perhaps inside a handler that a compiler put round ours
            self._code, self.is_told = code, True
            os.kill(os.getpid(), signal.SIGTERM)

    def give_ctrl_c_to(self, heard: Callable[[], None] | None) -> None:
        """Call `heard` at Ctrl-C from now on, and end nothing; with None, end the process again.

        It is called in the main thread, between any two instructions, and may raise.
        """
        self._heard = heard

    def check(self) -> None:
        """Raise `Interrupted` if a signal has come: the exception that it raised may be lost."""
        if self._received is not None:
            raise Interrupted(self._received)

    def _take(self) -> None:
        """Handle the signals from now on, except those that the parent process ignores."""
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)
        self._is_handling = True
        signal.signal(NUDGE, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # run.sh blocks them until now
        sys.unraisablehook = _unraisable
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._heard is not None and self._is_heard(number):
            self._heard()
            return
        is_first = number in SIGNALS and self._received is None
        if is_first:
            self._received = number
        if self._received is None or (self._is_over and not is_first):
            return
        if self._is_over:
            self._end(self._received)
        if not _is_unwinding():
            raise Interrupted(self._received)

    def _watch(self, pipe: int) -> None:
        """Remind the main thread of a signal until the process ends, or end it."""
        while (number := os.read(pipe, 1)[0]) not in SIGNALS or self._is_heard(number):
            pass
        start, main = time.monotonic(), threading.main_thread().ident or 0
        while True:
            time.sleep(INTERVAL)
            signal.pthread_kill(main, NUDGE)
            is_repeated = any(n in SIGNALS for n in os.read(pipe, 4096))
            elapsed = time.monotonic() - start
            if elapsed > PATIENCE or (is_repeated and elapsed > SAME):
                self._end(number)

    def _is_heard(self, number: int) -> bool:
        """Return whether a signal ends nothing, because somebody else wants to hear of it."""
        return number == signal.SIGINT and self._heard is not None and self._received is None

    def _end(self, number: int) -> NoReturn:
        """End the process at once, from any thread, without the streams' locks."""
        restored = "\r\x1b[K\x1b[?25h" if os.isatty(2) else ""  # a progress bar may hide the cursor
        line = "" if self.is_told else _line(number)
        try:
            os.write(2, f"{restored}{line}".encode())
        finally:
            os._exit(128 + number if self._code is None else self._code)


PROCESS = Interrupts()


def _line(number: int) -> str:
    by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
    return f"lfm2kit: interrupted{by}\n"


def _is_unwinding() -> bool:
    """Return whether an interrupt is already being handled; a second would stop the clean-up."""
    error = sys.exception()
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _unraisable(unraisable: Any) -> None:
    """Print what a callback or a destructor raised, except interrupts, which are raised again."""
    if not isinstance(unraisable.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
