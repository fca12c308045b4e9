"""`lfm2kit` and `python -m lfm2kit`.

Hardly anything is imported before signals are handled: until then an interrupt shows a traceback.
"""

from __future__ import annotations

import gc
import sys

import lfm2kit.process.start  # noqa: F401  # first, for it takes the time

TYPE_CHECKING = False  # type checkers take it for true
if TYPE_CHECKING:
    from typing import NoReturn


def script() -> NoReturn:
    """Run the command line as `main` does, and take over the process's signals and streams.

    Besides the exit codes of `main` there is 141, without a line, if the reader of stdout has left.
    """
    code = 130
    try:
        from lfm2kit.process.interrupts import PROCESS
        from lfm2kit.process.streams import Streams

        streams = Streams()
        streams.take()
        code = streams.conclude(PROCESS.ended(exit_code))
    except KeyboardInterrupt:  # before `ended` could handle it
        print("lfm2kit: interrupted", file=sys.stderr)
    except Exception as error:  # not even what handles errors could be imported
        code = _cannot_start(error)
    gc.freeze()  # Python ends four times as fast when it collects nothing, and hears no signal then
    sys.exit(code)


def _cannot_start(error: Exception) -> int:
    """Say so in one line, with as little as possible; the exit code."""
    said = " ".join(f"{type(error).__name__}: {error}".split())
    print(
        f"lfm2kit: error: lfm2kit cannot start ({said[:200]}): the limits here are too low "
        "(ulimit -a), or a package is damaged (install it again)",
        file=sys.stderr,
    )
    return 2


def main() -> NoReturn:
    """Run the command line of `sys.argv`, and raise SystemExit.

    Exit code 0 good, 1 the result is INVALID, 2 the user must act, 3 a bug, 130 after Ctrl-C; after
    another signal 128 and its number.
    """
    from lfm2kit.process.interrupts import told

    try:
        code = exit_code()
    except KeyboardInterrupt as error:
        code = told(error)
    sys.exit(code)


def exit_code() -> int:
    """Run the command line of `sys.argv` and return its exit code; interrupts are raised."""
    from lfm2kit.process.interrupts import PROCESS
    from lfm2kit.process.streams import READER_GONE, ReaderGone, StdoutFailed

    try:
        return _command()
    except KeyboardInterrupt:
        raise
    except ReaderGone:
        return READER_GONE
    except StdoutFailed as error:
        return _stdout_failed(error.said)
    except BaseException as error:  # a plugin may well raise SystemExit, whose code would be ours
        PROCESS.check()  # what looks like a bug may have come of a signal
        return _failed(error)


def _stdout_failed(said: str) -> int:
    from lfm2kit.cli.console import complain
    from lfm2kit.errors import USER_ERROR

    complain(said)
    return USER_ERROR


def _failed(error: BaseException) -> int:
    """Print what went wrong, and return the exit code."""
    import errno
    import os

    from lfm2kit.cli.console import complain, show_traceback
    from lfm2kit.cli.flags import told
    from lfm2kit.errors import BUG, TRACEBACK, USER_ERROR, Lfm2kitError

    if isinstance(error, MemoryError):
        complain(f"there is not enough memory ({error}); lfm2kit env shows what limits it")
        return USER_ERROR
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        complain(f"the limits here are too low (ulimit -a): {error}")
        return USER_ERROR
    if isinstance(error, Lfm2kitError):
        if os.environ.get(TRACEBACK):
            show_traceback(error)
        complain(told(error))
        return USER_ERROR
    show_traceback(error)
    complain("this is a bug, of lfm2kit or of a plugin; a report needs: lfm2kit env")
    return BUG


def _command() -> int:
    """Return the command's exit code; a wrong command line becomes an `Lfm2kitError`."""
    import typer

    from lfm2kit.cli import app
    from lfm2kit.errors import USER_ERROR, Lfm2kitError

    command = typer.main.get_command(app)
    try:  # not command.main(): that ends with an exit code of its own after a signal or on a pipe
        with command.make_context("lfm2kit", sys.argv[1:]) as context:
            command.invoke(context)
            return 0
    except typer.Exit as ended:
        return ended.exit_code
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
            return USER_ERROR
        if hasattr(error, "format_message"):  # click's errors, in whichever module they live
            path = getattr(getattr(error, "ctx", None), "command_path", "lfm2kit")
            said = error.format_message().rstrip(".")
            raise Lfm2kitError(f"{said} (see {path} --help)") from None
        raise


if __name__ == "__main__":
    script()
