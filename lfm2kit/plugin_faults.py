"""Turns whatever a plugin's code raises into one sentence that says whose code it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lfm2kit.errors import TRACEBACK_HINT, Lfm2kitError
from lfm2kit.transport import JobError


@contextmanager
def blaming(who: str, advice: str = "") -> Iterator[None]:
    """Raise `Lfm2kitError`, "`who` raised KeyError: ...", for what is raised inside.

    Errors that mean something to the core pass unchanged: those of the user, of memory, of a job.
    """
    try:
        yield
    except (Lfm2kitError, MemoryError, JobError):
        raise
    except (Exception, SystemExit) as error:
        said = (str(error).splitlines() or [""])[0]
        raise Lfm2kitError(
            f"{who} raised {type(error).__name__}: {said}{advice}{TRACEBACK_HINT}"
        ) from error


def name_of(code: object) -> str:
    """Return the name of a class or a function with its module, which says whose it is."""
    name = getattr(code, "__qualname__", type(code).__name__)
    return f"{getattr(code, '__module__', '?')}.{name}"
