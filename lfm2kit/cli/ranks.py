"""Commands that run on several ranks: starting the job, joining it, and ending all of it."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import typer

from lfm2kit.cli.console import complain, err
from lfm2kit.errors import Lfm2kitError
from lfm2kit.plugins import Plugins
from lfm2kit.transport import JobError, Transport

INTERNAL_ERROR = 3  # a rank met a bug: neither the result's fault nor the user's
INTERRUPTED = 130
TRACEBACK = "LFM2KIT_TRACEBACK"


def joined_job(plugins: Plugins, transport: str, ranks: int | None) -> Transport | None:
    """This process's place in the job that it was started in; None outside any.

    Raises `Lfm2kitError` where `ranks` asks for another number than the job has.
    """
    if transport not in plugins.transports and (ranks or 1) == 1:
        return None
    launcher = plugins.transport(transport).launcher
    size = launcher.world_size() or 1
    if size == 1:
        return None
    if ranks not in (None, size):
        raise Lfm2kitError(f"--ranks {ranks}, but this job has {size}; leave --ranks out here")
    return launcher.connect()


def launched(plugins: Plugins, transport: str, ranks: int, arguments: Sequence[str]) -> int:
    """The exit code of `lfm2kit *arguments` on `ranks` ranks."""
    try:
        return plugins.transport(transport).launcher.launch(ranks, arguments)
    except JobError as error:
        err.print(error.details, end="", markup=False)
        complain(str(error))
        return error.exit_code


@contextmanager
def ending_all_ranks(transport: Transport | None) -> Iterator[None]:
    """Makes one rank's failure the whole job's, and its end known where it ends well.

    The others would wait for a rank that has failed; one that leaves without a word has failed too.
    """
    try:
        yield
    except typer.Exit as error:
        if transport is not None:
            transport.finish(error.exit_code)
        raise
    except BaseException as error:
        if transport is not None:
            transport.abort(*_reason(error))
        raise
    if transport is not None:
        transport.finish(0)


def _reason(error: BaseException) -> tuple[int, str, str]:
    """The exit code, the sentence and, where asked for, the traceback of a rank's failure."""
    wanted = bool(os.environ.get(TRACEBACK))
    details = "".join(traceback.format_exception(error)) if wanted else ""
    if isinstance(error, Lfm2kitError):
        return 2, str(error), details
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted", details
    said = f"{type(error).__name__}: {error}".rstrip(": ").partition("\n")[0]
    if isinstance(error, SystemExit):
        return INTERNAL_ERROR, f"sys.exit({error.code!r}) was called", details
    if isinstance(error, MemoryError):
        return 2, f"out of memory ({said})", details
    hint = "" if wanted else f"; its traceback: {TRACEBACK}=1"
    return INTERNAL_ERROR, f"{said}{hint}", details
