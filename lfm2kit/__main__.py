"""`lfm2kit` and `python -m lfm2kit`."""

from __future__ import annotations

import os
import sys
import traceback
from typing import NoReturn

from lfm2kit.errors import Lfm2kitError

TRACEBACK = "LFM2KIT_TRACEBACK"  # set: errors show where they come from, for plugin writers
BUG = 3
INTERRUPTED = 130  # as a shell reports a process that SIGINT ended


def main() -> NoReturn:
    """Runs the command line.

    Exit code 0 good, 1 the result is INVALID, 2 the user must act, 3 a bug, 130 interrupted.
    """
    try:
        sys.exit(_command())
    except Lfm2kitError as error:
        if os.environ.get(TRACEBACK):
            raise
        _complain(str(error))
        sys.exit(2)
    except MemoryError as error:
        _complain(f"there is not enough memory ({error}); lfm2kit env shows what limits it")
        sys.exit(2)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except KeyboardInterrupt:
        _complain("interrupted")
        sys.exit(INTERRUPTED)
    except Exception:
        traceback.print_exc()
        _complain("this is a bug, of lfm2kit or of a plugin; a report needs: lfm2kit env")
        sys.exit(BUG)


def _command() -> int:
    """The command's exit code; what is wrong with its words becomes an `Lfm2kitError`."""
    from lfm2kit.cli import app  # here: Ctrl-C may come while NumPy is imported

    try:
        return app(prog_name="lfm2kit", standalone_mode=False) or 0
    except Exception as error:
        if type(error).__name__ == "Abort":  # typer's word for Ctrl-C
            raise KeyboardInterrupt from None
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
            return 2
        if hasattr(error, "format_message"):  # click's errors, in whichever module they live
            path = getattr(getattr(error, "ctx", None), "command_path", "lfm2kit")
            said = error.format_message().rstrip(".")
            raise Lfm2kitError(f"{said} (see {path} --help)") from None
        raise


def _complain(sentence: str) -> None:
    from lfm2kit.cli.console import complain

    complain(sentence)


if __name__ == "__main__":
    main()
