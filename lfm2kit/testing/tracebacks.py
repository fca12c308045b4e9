"""Where in a backend's code an error was raised, and whose frames pytest shows."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from types import FrameType

from lfm2kit.errors import TRACEBACK

KIT = "lfm2kit.testing"
OTHERS = ("lfm2kit", "numpy")  # packages whose code a backend calls, or is called by
REFERENCE = "lfm2kit.reference"  # within them, but a backend


def place_of(error: BaseException) -> str | None:
    """Return the file, line and function of a backend in which `error` was raised.

    That is the innermost frame outside of lfm2kit and NumPy; None if there is none.
    """
    frames = [(f, line) for f, line in traceback.walk_tb(error.__traceback__) if _is_backends(f)]
    if not frames:
        return None
    frame, line = frames[-1]
    return f"{_short(frame.f_code.co_filename)}:{line} in {frame.f_code.co_qualname}"


def hide_frames() -> None:
    """Let pytest leave the kit's frames out of tracebacks, unless LFM2KIT_TRACEBACK is set.

    `pytest --full-trace` shows them all the same.
    """
    is_hidden = not os.environ.get(TRACEBACK)
    for name, module in list(sys.modules.items()):
        if _is_in(name, KIT) and not name.startswith(f"{KIT}.test_"):
            vars(module)["__tracebackhide__"] = is_hidden


def _is_backends(frame: FrameType) -> bool:
    module = str(frame.f_globals.get("__name__", ""))
    return _is_in(module, REFERENCE) or not any(_is_in(module, other) for other in OTHERS)


def _is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _short(file: str) -> str:
    """Return a file's path from here, if it is below here."""
    path, here = Path(file), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else file
