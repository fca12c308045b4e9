"""Commands that run on several ranks: starting the job, joining it, and ending all of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lfm2kit.cli.console import complain, show_traceback
from lfm2kit.errors import Lfm2kitError
from lfm2kit.interrupts import exit_code
from lfm2kit.plugins import Plugins
from lfm2kit.streams import READER_GONE, ReaderGone
from lfm2kit.transport import Transport

INTERNAL_ERROR = 3  # a rank met a bug: neither the result's fault nor the user's


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
    return plugins.transport(transport).launcher.launch(ranks, arguments)


@contextmanager
def ending_all_ranks(transport: Transport | None) -> Iterator[None]:
    """Makes one rank's failure the whole job's: the others would wait for it for ever."""
    try:
        yield
    except BaseException as error:
        if transport is not None:
            _end(transport, error)
        raise


def _end(transport: Transport, error: BaseException) -> None:
    rank = transport.world.rank
    if isinstance(error, (KeyboardInterrupt, ReaderGone)):  # who started the job says it, if anyone
        transport.abort(READER_GONE if isinstance(error, ReaderGone) else exit_code(error))
        return
    if isinstance(error, Lfm2kitError):
        complain(f"rank {rank}: {error}")
        transport.abort(2)
    complain(f"rank {rank} failed; ending all ranks")
    show_traceback(error)
    transport.abort(INTERNAL_ERROR)
