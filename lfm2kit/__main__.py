"""`lfm2kit` and `python -m lfm2kit`."""

from __future__ import annotations

import os
import sys

from lfm2kit.cli import app
from lfm2kit.cli.console import complain
from lfm2kit.errors import Lfm2kitError

TRACEBACK = "LFM2KIT_TRACEBACK"  # set: errors show where they come from, for plugin writers
INTERRUPTED = 130  # as a shell reports a process that SIGINT ended


def main() -> None:
    """Runs the command line: exit code 0 good, 1 the result is INVALID, 2 the user must act."""
    try:
        app()
    except Lfm2kitError as error:
        if os.environ.get(TRACEBACK):
            raise
        complain(str(error))
        sys.exit(2)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except KeyboardInterrupt:
        complain("interrupted")
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
