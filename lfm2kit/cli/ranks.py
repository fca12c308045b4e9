"""Starts, joins and ends the job of a command that runs on several ranks.

An error on one rank has to reach the others, which would wait for that rank for ever.  So a rank
first joins its job and then prepares; even a rank with a wrong command line joins, to report it.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from lfm2kit.building.plugins import find_transport
from lfm2kit.cli.console import complain
from lfm2kit.cli.flags import flag, told
from lfm2kit.cli.help import PlainCommand
from lfm2kit.cli.rewrite_options import settled
from lfm2kit.errors import BUG, TRACEBACK, TRACEBACK_HINT, USER_ERROR, Lfm2kitError, Option
from lfm2kit.ranks.agreement import Fact, Facts, JointError, Refusal, agree
from lfm2kit.ranks.joining import connected, facts_of
from lfm2kit.ranks.launchers import DEFAULT_TRANSPORT, Started, started
from lfm2kit.ranks.reasons import reason
from lfm2kit.text import indented
from lfm2kit.transport import JobError, Launcher, Transport

if TYPE_CHECKING:
    from lfm2kit.building.loading import Setup

T = TypeVar("T")

INDEPENDENT = ", or give --independent if that is what you want"


def joined_job(name: str) -> Transport | None:
    """Return the transport of the job that this process belongs to; None if it is alone.

    Load only the plugin of the transport `name`.  Raise `Lfm2kitError` if a launcher started
    several processes that cannot be ranks of one job.
    """
    others = started()
    try:
        launcher = find_transport(name).launcher
    except Lfm2kitError as error:
        if others is None and name == DEFAULT_TRANSPORT:
            return None  # it need not be installed; --ranks without it is an error at the launch
        refuse(told(error))
        if others is None:
            raise
        raise Lfm2kitError(
            f"{told(error)}. Without it, each of the {others.size} processes that were started "
            f"({others.evidence}) would run everything: install it, or give --independent"
        ) from None
    return _joined(launcher)


def _joined(launcher: Launcher) -> Transport | None:
    """Return the transport of this process's job; None if it is alone.

    Of several processes that are not ranks, one says so; all of them exit.
    """
    if launcher.world_size() is None and (others := started()) is not None:
        _leave_it_to_one(others)
    return connected(launcher, INDEPENDENT)


def refuse_copies() -> None:
    """End every process if a launcher started several, for a command that knows no ranks.

    One of them raises `Lfm2kitError`, and says so.
    """
    if (others := started()) is None:
        return
    _leave_it_to_one(others)
    raise Lfm2kitError(f"{others}, and each would do the same; start this command once")


def _leave_it_to_one(others: Started) -> None:
    """End this process unless it is the one of several that says why they end."""
    if not others.is_first_to_know:
        raise typer.Exit(USER_ERROR)


def check_size(job: Transport | None, ranks: int | None) -> None:
    """Raise `Lfm2kitError` if other `ranks` are asked for than those of the job."""
    if job is not None and ranks not in (None, job.world.size):
        raise Lfm2kitError(
            f"--ranks {ranks}, but this job has {job.world.size}; leave --ranks out here"
        )


def refuse(sentence: str, name: str = DEFAULT_TRANSPORT) -> None:
    """End the job that this process belongs to, before it has joined; return if there is none."""
    try:
        job = _joined(find_transport(name).launcher)
    except Lfm2kitError:
        return
    if job is not None:
        with ending_all_ranks(job):
            _settle(job, Refusal(sentence))


def refuse_options(error: Lfm2kitError, options: Mapping[str, Any]) -> None:
    """End the job of a rank whose options do not go together, unless it runs alone."""
    if not options["independent"]:
        refuse(told(error), options["transport"])


def check_independent(ranks: int | None, independent: bool) -> None:
    """Raise `Lfm2kitError` if a job is to be started by a process that is to run alone."""
    if independent and (ranks or 1) > 1:
        raise Lfm2kitError(
            f"--ranks {ranks} starts a job, and --independent runs alone; give only one of them"
        )


def agreed(job: Transport | None, prepare: Callable[[], T], facts: Callable[[T], Facts]) -> T:
    """Return the result of `prepare` once every rank has prepared, with the same facts.

    If a rank fails, or facts differ, every rank exits and rank 0 says why.
    """
    if job is None:
        return prepare()
    try:
        prepared = prepare()
        report: Facts | Refusal = facts(prepared)
    except Exception as error:
        report = _refusal(error)
    _settle(job, report)
    return prepared


def facts_of_setup(setup: Setup) -> Facts:
    """Return what the ranks must have in common, options by what users type."""
    facts = dict(facts_of(setup, lambda name: flag(Option(name))))
    facts.pop(flag(Option("rewrites")))
    for name, value in settled(setup.options.rewrites).items():
        is_given = "given" if value else "not given"
        facts[name] = Fact(value if isinstance(value, str) else is_given)
    return facts


def _refusal(error: Exception) -> Refusal:
    """Return the report of a rank on which `error` was raised."""
    exit_code, sentence, details = _reason(error)
    _show(details)
    return Refusal(f"this is a bug: {sentence}" if exit_code == BUG else sentence, exit_code)


def _settle(job: Transport, report: Facts | Refusal) -> None:
    """Return if all ranks agree; else all of them exit."""
    refusal = agree(job, report)
    if refusal is None:
        return
    if job.world.rank == 0:
        complain(refusal.sentence)
    job.barrier()  # a launcher may end the others as soon as one rank exits
    raise typer.Exit(refusal.exit_code)


class RanksCommand(PlainCommand):
    """A command that ends the job on every rank if the command line is wrong on one of them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words = list(args)
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            sentence = _sentence(error)
            if sentence is not None and "--independent" not in words:
                refuse(sentence, _transport_in(words))
            raise


def _sentence(error: Exception) -> str | None:
    """Return what is wrong with a command line; None if nothing is, as for --help."""
    if isinstance(error, Lfm2kitError):
        return told(error)
    said = getattr(error, "format_message", None)  # typer's errors, wherever they are defined
    return str(said()).rstrip(".") if said is not None else None


def _transport_in(words: Sequence[str]) -> str:
    """Return the transport that a command line names, even if the line is wrong."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        option, _, value = word.partition("=")
        if option == "--transport":
            return value or following
    return DEFAULT_TRANSPORT


def leave_to_ranks(job: Transport | None, transport: str, ranks: int | None) -> None:
    """End this process if its command is for several ranks, and it is not one of them.

    They run the same command; its exit code is theirs.
    """
    if job is None and (ranks or 1) > 1:
        raise typer.Exit(_launched(transport, ranks or 1, sys.argv[1:]))


def _launched(transport: str, ranks: int, arguments: Sequence[str]) -> int:
    """Run `lfm2kit *arguments` on `ranks` ranks, and return the exit code."""
    try:
        return find_transport(transport).launcher.launch(ranks, arguments)
    except JobError as error:
        _show(error.details)
        complain(str(error))
        return error.exit_code


def _show(details: str) -> None:
    """Print a traceback, or what a launcher said, so that no line looks like one of ours."""
    for line in indented(details):
        print(line, file=sys.stderr)


@contextmanager
def ending_all_ranks(transport: Transport | None) -> Iterator[None]:
    """Report this rank's end to the job; a failure ends all ranks.

    The others would wait for a rank that has failed.  A rank that ends without reporting counts as
    failed.  What every rank raises is said once.
    """
    try:
        with _told_once(transport):
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


@contextmanager
def _told_once(job: Transport | None) -> Iterator[None]:
    """End every rank with one line where all of them raise the same error."""
    try:
        yield
    except JointError as error:
        assert job is not None, "only the ranks of a job raise it"
        _settle(job, Refusal(told(error)))
        raise


def _reason(error: BaseException) -> tuple[int, str, str]:
    """Return the exit code, a sentence and, if asked for, the traceback of a rank's failure."""
    code, sentence = reason(error, told)
    if os.environ.get(TRACEBACK):
        return code, sentence, "".join(traceback.format_exception(error))
    return code, f"{sentence}{TRACEBACK_HINT}" if code == BUG else sentence, ""
